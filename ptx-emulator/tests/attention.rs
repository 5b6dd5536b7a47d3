//! A kernel of attention for sm_80, as a person would write it: K and V come in by `cp.async` into
//! two stages, `ldmatrix` makes fragments of them, and `mma.sync` multiplies. It is compared with
//! f64, and what it must not leave out is left out.

mod common;

use common::Random;
use half::bf16;
use ptx_emulator::{Fault, FaultKind, LaunchConfig, Memory, Module, Options, Stats};

/// Queries of a block: 16 for each of four warps. Keys of a tile, and channels of a row.
const QUERIES: usize = 64;
const TILE: usize = 64;
const CHANNELS: usize = 64;
/// Heads, each with a block, and the keys of each. The last tile has only 9.
const HEADS: usize = 2;
const KEYS: usize = 3 * TILE + 9;

/// What a variant of the kernel leaves out or does otherwise.
#[derive(Clone, Copy, PartialEq)]
enum Variant {
    Right,
    /// Chunks of 16 bytes lie in their order, in place of the swizzle.
    NoSwizzle,
    /// Nobody waits for the copies of a stage.
    NoWait,
    /// A thread waits for its own copies, but not for the threads that copied the rest.
    NoBarrierAfterWait,
    /// A stage is copied to while other warps may still read it.
    NoBarrierBeforeCopy,
    /// The keys beyond the last are copied, in place of zeros.
    NoZeros,
}

/// The kernel. A row has 128 bytes in global and in shared memory: 8 chunks of 16 bytes. In shared
/// memory, chunk c of row r lies at the place c ^ r % 8 of its row.
fn kernel(variant: Variant) -> String {
    let swizzle = |to: &str, row: &str| match variant {
        Variant::NoSwizzle => String::new(),
        _ => format!("and.b32 %t, {row}, 7; xor.b32 {to}, {to}, %t;"),
    };
    let unless = |left_out: Variant, text: &str| if variant == left_out { String::new() } else { text.to_string() };
    let list = |name: &str, first: usize, count: usize| {
        (first..first + count).map(|i| format!("%{name}{i}")).collect::<Vec<_>>().join(", ")
    };
    // Copies a tile of 64 rows. A thread has a chunk of each sixteenth row, and zeros replace rows
    // from %rows on.
    let copy = |to: &str, from: &str| -> String {
        let bytes = if variant == Variant::NoZeros { "16" } else { "%t" };
        let row = |i: usize| {
            format!(
                "add.u32 %t, %row, {}; setp.lt.s32 %p0, %t, %rows; selp.b32 %t, 16, 0, %p0;
                 cp.async.cg.shared.global [{to}+{at}], [{from}+{at}], 16, {bytes};\n",
                16 * i,
                at = 2048 * i,
            )
        };
        (0..4).map(row).collect()
    };
    let multiply = |d: &str, i: usize, a: &str, first: usize, b: &str| {
        let d = list(d, 4 * i, 4);
        format!(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{d}}}, {{{}}}, {{{b}}}, {{{d}}};\n",
            list(a, first, 4)
        )
    };
    let each = |count: usize, text: &dyn Fn(usize) -> String| (0..count).map(text).collect::<String>();
    let load_q = each(4, &|k| {
        format!(
            "xor.b32 %t, %at_q, {}; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}}}, [%t];\n",
            32 * k,
            list("q", 4 * k, 4)
        )
    });
    // Scores of 16 keys take two products for each 16 channels.
    let scores = each(4, &|k| {
        let sixteen = |j: usize| {
            format!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%b0, %b1, %b2, %b3}}, [%t+{}];\n", 2048 * j)
                + &multiply("s", 2 * j, "q", 4 * k, "%b0, %b1")
                + &multiply("s", 2 * j + 1, "q", 4 * k, "%b2, %b3")
        };
        format!("xor.b32 %t, %at_k, {};\n{}", 32 * k, each(4, &sixteen))
    });
    let mask = each(32, &|i| {
        let column = 8 * (i / 4) + i % 2;
        format!("setp.gt.s32 %p0, %u, {column}; selp.f32 %s{i}, %s{i}, 0fFF800000, %p0;\n")
    });
    // Rows r and r + 8 of the warp: two of each four accumulators are of one.
    let softmax = each(2, &|row| {
        let own: Vec<usize> = (0..32).filter(|i| i % 4 / 2 == row).collect();
        let most: String = own.iter().map(|i| format!("max.f32 %x, %x, %s{i};\n")).collect();
        let weights: String = own
            .iter()
            .map(|i| {
                format!(
                    "fma.rn.f32 %s{i}, %s{i}, %scale, %y; ex2.approx.ftz.f32 %s{i}, %s{i}; add.f32 %l{row}, %l{row}, %s{i};\n"
                )
            })
            .collect();
        let rescale: String = own.iter().map(|i| format!("mul.f32 %o{i}, %o{i}, %z;\n")).collect();
        format!(
            "mov.f32 %x, 0fFF800000; {most}
             shfl.sync.bfly.b32 %y, %x, 1, 31, -1; max.f32 %x, %x, %y;
             shfl.sync.bfly.b32 %y, %x, 2, 31, -1; max.f32 %x, %x, %y;
             mul.f32 %x, %x, %scale; max.f32 %x, %x, %m{row}; sub.f32 %z, %m{row}, %x; ex2.approx.ftz.f32 %z, %z;
             mov.f32 %m{row}, %x; neg.f32 %y, %x; mul.f32 %l{row}, %l{row}, %z; {rescale} {weights}"
        )
    });
    let pack = each(16, &|i| format!("cvt.rn.bf16x2.f32 %w{i}, %s{}, %s{};\n", 2 * i + 1, 2 * i));
    let values = each(4, &|c| {
        let sixteen = |t: usize| {
            format!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%b0, %b1, %b2, %b3}}, [%t+{}];\n", 2048 * t)
                + &multiply("o", 2 * c, "w", 4 * t, "%b0, %b1")
                + &multiply("o", 2 * c + 1, "w", 4 * t, "%b2, %b3")
        };
        format!("xor.b32 %t, %at_v, {};\n{}", 32 * c, each(4, &sixteen))
    });
    let finish = each(2, &|row| {
        format!(
            "shfl.sync.bfly.b32 %y, %l{row}, 1, 31, -1; add.f32 %l{row}, %l{row}, %y;
             shfl.sync.bfly.b32 %y, %l{row}, 2, 31, -1; add.f32 %l{row}, %l{row}, %y; rcp.approx.ftz.f32 %l{row}, %l{row};\n"
        )
    });
    let store = each(16, &|i| {
        let (first, row) = (2 * i, i % 2);
        format!(
            "mul.f32 %x, %o{first}, %l{row}; mul.f32 %y, %o{}, %l{row}; st.global.v2.f32 [%out+{}], {{%x, %y}};\n",
            first + 1,
            i / 2 * 32 + row * 8 * CHANNELS * 4
        )
    });
    let zero = |name: &str, count: usize| each(count, &|i| format!("mov.f32 %{name}{i}, 0f00000000;\n"));
    let scale = (std::f32::consts::LOG2_E / (CHANNELS as f32).sqrt()).to_bits();
    format!(
        ".version 7.0
.target sm_80
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry attention(
    .param .u64 out, .param .u64 q, .param .u64 k, .param .u64 v, .param .u32 keys
) .maxntid 128 {{
    .reg .pred %p<3>; .reg .b64 %out, %from_q, %from_k, %from_v, %place;
    .reg .b32 %t, %u, %thread, %lane, %warp, %head, %row, %rows, %left, %to, %stage, %at, %at_q, %at_k, %at_v, %base_k, %base_v;
    .reg .b32 %q<16>, %b<4>, %w<16>; .reg .f32 %s<32>, %o<32>, %m<2>, %l<2>, %x, %y, %z, %scale;
    mov.u32 %thread, %tid.x; mov.u32 %head, %ctaid.x; and.b32 %lane, %thread, 31; shr.u32 %warp, %thread, 5;
    ld.param.u64 %out, [out]; ld.param.u64 %from_q, [q]; ld.param.u64 %from_k, [k]; ld.param.u64 %from_v, [v];
    ld.param.u32 %left, [keys]; mov.f32 %scale, 0f{scale:08X};
    // A thread copies chunk thread % 8 of rows thread / 8 + 16 i.
    mul.wide.u32 %place, %thread, 16; add.s64 %from_q, %from_q, %place; add.s64 %from_k, %from_k, %place; add.s64 %from_v, %from_v, %place;
    mul.lo.u32 %t, %head, {q_bytes}; cvt.u64.u32 %place, %t; add.s64 %from_q, %from_q, %place;
    mul.lo.u32 %t, %left, 128; mul.lo.u32 %t, %t, %head; cvt.u64.u32 %place, %t; add.s64 %from_k, %from_k, %place; add.s64 %from_v, %from_v, %place;
    shr.u32 %row, %thread, 3; and.b32 %to, %thread, 7; {swizzle_copy}
    shl.b32 %to, %to, 4; mad.lo.u32 %to, %row, 128, %to; mov.u32 %t, smem; add.u32 %to, %to, %t;
    // Q has the first 8 KiB. Two stages of K and V follow, each with 16 KiB.
    mov.u32 %rows, {QUERIES}; {copy_q}
    add.u32 %to, %to, 8192; mov.u32 %rows, %left; {copy_k} add.u32 %at, %to, 8192; {copy_v}
    cp.async.commit_group;
    // Rows of matrices for Q and V: lane % 16, chunk lane / 16. Those for K: 8 keys in lanes 0 to 15
    // and in lanes 16 to 31, chunk lane / 8 % 2.
    and.b32 %row, %lane, 15; shr.u32 %u, %lane, 4; {swizzle_row}
    shl.b32 %u, %u, 4; mad.lo.u32 %base_v, %row, 128, %u; mov.u32 %t, smem; add.u32 %base_v, %base_v, %t;
    mad.lo.u32 %at_q, %warp, 2048, %base_v; add.u32 %base_v, %base_v, 16384;
    and.b32 %row, %lane, 7; shr.u32 %u, %lane, 4; mad.lo.u32 %row, %u, 8, %row; shr.u32 %u, %lane, 3; and.b32 %u, %u, 1; {swizzle_row}
    shl.b32 %u, %u, 4; mad.lo.u32 %base_k, %row, 128, %u; mov.u32 %t, smem; add.u32 %base_k, %base_k, %t; add.u32 %base_k, %base_k, 8192;
    shr.u32 %row, %thread, 3;
    {zero_o} {zero_l} mov.f32 %m0, 0fFF800000; mov.f32 %m1, 0fFF800000; mov.u32 %stage, 0;
    mov.pred %p1, 0;
TILE:
    // The next tile is copied while this one is read.
    setp.gt.s32 %p2, %left, {TILE}; @!%p2 bra LAST;
    xor.b32 %u, %stage, 16384; add.s64 %from_k, %from_k, 8192; add.s64 %from_v, %from_v, 8192;
    add.u32 %at, %to, %u; sub.s32 %rows, %left, {TILE}; {copy_next_k} add.u32 %at, %at, 8192; {copy_v}
    cp.async.commit_group; {wait_one} bra HERE;
LAST:
    {wait_all}
HERE:
    {barrier_after_wait}
    @%p1 bra HAVE_Q;
    {load_q} mov.pred %p1, -1;
HAVE_Q:
    add.u32 %at_k, %base_k, %stage; add.u32 %at_v, %base_v, %stage; xor.b32 %stage, %stage, 16384;
    {zero_s} {scores}
    // The columns of a lane begin at 2 (lane % 4).
    and.b32 %u, %lane, 3; shl.b32 %u, %u, 1; sub.s32 %u, %left, %u; @%p2 bra WHOLE;
    {mask}
WHOLE:
    {softmax} {pack} {values}
    {barrier_before_copy}
    sub.s32 %left, %left, {TILE}; @%p2 bra TILE;
    {finish}
    // Row lane / 4 of the warp's 16, and the channels from 2 (lane % 4) on.
    shr.u32 %row, %lane, 2; mad.lo.u32 %row, %warp, 16, %row; mad.lo.u32 %row, %head, {QUERIES}, %row;
    and.b32 %u, %lane, 3; shl.b32 %u, %u, 3; mad.lo.u32 %u, %row, {out_row}, %u; cvt.u64.u32 %place, %u; add.s64 %out, %out, %place;
    {store} ret;
}}
",
        q_bytes = QUERIES * 128,
        out_row = CHANNELS * 4,
        swizzle_copy = swizzle("%to", "%row"),
        swizzle_row = swizzle("%u", "%row"),
        copy_q = copy("%to", "%from_q"),
        copy_k = copy("%to", "%from_k"),
        copy_next_k = copy("%at", "%from_k"),
        copy_v = copy("%at", "%from_v"),
        zero_o = zero("o", 32),
        zero_l = zero("l", 2),
        zero_s = zero("s", 32),
        wait_one = unless(Variant::NoWait, "cp.async.wait_group 1;"),
        wait_all = "cp.async.wait_all;",
        barrier_after_wait = unless(Variant::NoBarrierAfterWait, "bar.sync 0;"),
        barrier_before_copy = unless(Variant::NoBarrierBeforeCopy, "bar.sync 1, 128;"),
    )
}

/// Queries, keys and values of all heads, as [head][row][channel].
struct Inputs {
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
}

fn inputs() -> Inputs {
    let mut random = Random(80);
    let mut rows = |count: usize, size: f32| -> Vec<bf16> {
        (0..HEADS * count * CHANNELS).map(|_| bf16::from_f32(size * random.unit())).collect()
    };
    // Scores have a standard deviation of about 2, so that weights differ much.
    Inputs { q: rows(QUERIES, 3.0), k: rows(KEYS, 2.0), v: rows(KEYS, 1.0) }
}

fn run(module: &Module, inputs: &Inputs, seed: u64) -> Result<(Vec<f32>, Stats), Fault> {
    let mut memory = Memory::new();
    let bytes = (HEADS * QUERIES * CHANNELS * 4) as u64;
    let out = memory.alloc(bytes, 256).expect("memory");
    let mut params = out.to_le_bytes().to_vec();
    for rows in [&inputs.q, &inputs.k, &inputs.v] {
        let image: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
        let address = memory.alloc(image.len() as u64, 256).expect("memory");
        memory.write(address, &image).expect("memory");
        params.extend(address.to_le_bytes());
    }
    params.extend((KEYS as u32).to_le_bytes());
    let config = LaunchConfig { grid: [HEADS as u32, 1, 1], block: [128, 1, 1], shared_bytes: 40 * 1024 };
    let options = Options { seed, ..Options::default() };
    let stats = module.launch_with(&memory, "attention", config, &params, options)?;
    let out = memory.read(out, bytes).expect("memory");
    Ok((out.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect(), stats))
}

/// Compares an output with f64.
fn check(inputs: &Inputs, out: &[f32]) {
    let row = |rows: &[bf16], row: usize| -> Vec<f64> {
        rows[row * CHANNELS..][..CHANNELS].iter().map(|value| value.to_f64()).collect()
    };
    for (index, found) in out.chunks(CHANNELS).enumerate() {
        let head = index / QUERIES;
        let q = row(&inputs.q, index);
        let score = |key: usize| q.iter().zip(row(&inputs.k, head * KEYS + key)).map(|(q, k)| q * k).sum::<f64>() / 8.0;
        let scores: Vec<f64> = (0..KEYS).map(score).collect();
        let most = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (channel, found) in found.iter().enumerate() {
            let terms =
                (0..KEYS).map(|key| weights[key] / sum * inputs.v[(head * KEYS + key) * CHANNELS + channel].to_f64());
            let (exact, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            // Weights are rounded to bf16. All else is f32, with errors below 2^-15 of a score.
            let bound = (2f64.powi(-9) + 2f64.powi(-13)) * size;
            assert!((*found as f64 - exact).abs() <= bound, "row {index}, channel {channel}: {found} for {exact}");
        }
    }
}

#[test]
fn attention_of_two_heads() {
    let (inputs, module) = (inputs(), common::module(&kernel(Variant::Right)));
    let (out, stats) = run(&module, &inputs, 0).unwrap_or_else(|fault| panic!("{fault}"));
    check(&inputs, &out);
    assert_eq!(stats.bank_conflicts(), (0, String::new()));
    let tiles = KEYS.div_ceil(TILE) * HEADS;
    assert_eq!(stats.multiply_adds as usize, tiles * 2 * QUERIES * TILE * CHANNELS);
    assert_eq!(stats.count("mma.sync") as usize, tiles * 4 * 2 * 32);
    assert_eq!(stats.count("ldmatrix") as usize, tiles * 4 * 2 * 16 + HEADS * 4 * 4);
    for seed in 1..12 {
        let (other, _) = run(&module, &inputs, seed).unwrap_or_else(|fault| panic!("{fault}"));
        assert!(other == out, "seed {seed} gives another output");
    }
}

#[test]
fn without_a_swizzle_every_matrix_has_conflicts() {
    let inputs = inputs();
    let (out, stats) = run(&common::module(&kernel(Variant::NoSwizzle)), &inputs, 0).unwrap_or_else(|f| panic!("{f}"));
    check(&inputs, &out);
    // Eight rows of 128 bytes lie in the same four banks, but copies write whole rows.
    let (conflicts, report) = stats.bank_conflicts();
    assert_eq!(conflicts, stats.count("ldmatrix") * (32 - 4), "{report}");
    assert!(report.lines().all(|line| line.contains("ldmatrix")), "{report}");
}

#[test]
fn what_must_not_be_left_out() {
    let inputs = inputs();
    for (variant, kind, words) in [
        (Variant::NoWait, FaultKind::Race, "is the target of an asynchronous copy that no wait has seen complete"),
        (Variant::NoBarrierAfterWait, FaultKind::Race, "matrix read of 16 bytes"),
        (Variant::NoBarrierBeforeCopy, FaultKind::Race, "asynchronous copy of 16 bytes"),
        (Variant::NoZeros, FaultKind::OutOfBounds, "asynchronous copy of 16 bytes at global"),
    ] {
        let module = common::module(&kernel(variant));
        let mut found = Vec::new();
        for seed in 0..12 {
            let fault = run(&module, &inputs, seed).expect_err(words);
            // A warp that runs ahead of all others may read what nobody has copied yet.
            let ahead = variant == Variant::NoBarrierAfterWait && fault.kind == FaultKind::Uninitialised;
            assert!(fault.kind == kind || ahead, "{fault}");
            found.push(fault.to_string());
        }
        assert!(found.iter().any(|fault| fault.contains(words)), "{words:?} is in none of {found:#?}");
    }
}
