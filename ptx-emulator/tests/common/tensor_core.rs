//! Dot products that tell one arithmetic of tensor cores from another, programs that compute them by
//! `wgmma` and by `mma.sync`, and a file of results.
//!
//! `examples/wgmma_probe.rs` and `examples/mma_probe.rs` run the programs on a GPU and write the
//! file. `tests/tensor_core.rs` runs them in the emulator and compares. Exact arithmetic makes the operands from seeds, so that
//! the file has to hold results only.

#![allow(dead_code)]

use super::common::{Random, place_in_a, place_in_d};
use half::{bf16, f16};
use ptx_emulator::{LaunchConfig, Memory, Module};

/// The rows and columns of a tile of accumulators.
pub const ROWS: usize = 64;
pub const COLUMNS: usize = 8;

/// The bytes of k that one instruction takes from a row, whatever the format.
const STEP: usize = 32;

/// The type of both operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Bf16,
    F16,
    E4m3,
}

impl Format {
    pub const ALL: [Format; 3] = [Format::Bf16, Format::F16, Format::E4m3];

    pub fn name(self) -> &'static str {
        match self {
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::E4m3 => "e4m3",
        }
    }

    /// How many elements of k one instruction takes.
    pub fn k(self) -> usize {
        if self == Format::E4m3 { 32 } else { 16 }
    }

    /// How many bits below the largest term an H100 was found to keep. Sweeps have it in their
    /// middle.
    pub fn kept(self) -> i32 {
        if self == Format::E4m3 { 13 } else { 25 }
    }

    /// The smallest normal exponent, the largest exponent, and the bits of the fraction.
    pub fn range(self) -> (i32, i32, i32) {
        match self {
            Format::Bf16 => (-126, 127, 7),
            Format::F16 => (-14, 15, 10),
            Format::E4m3 => (-6, 8, 3),
        }
    }

    /// The bits of the nearest value, with ties to even. Beyond the range of e4m3 it is the
    /// largest.
    pub fn bits(self, value: f64) -> u32 {
        match self {
            Format::Bf16 => bf16::from_f64(value).to_bits() as u32,
            Format::F16 => f16::from_f64(value).to_bits() as u32,
            Format::E4m3 => {
                let exponent = ((value.to_bits() >> 52 & 0x7ff) as i32 - 1023).clamp(-6, 8);
                let steps = (value.abs() * exp2(3 - exponent)).round_ties_even() as u32;
                let magnitude = (((exponent + 6) as u32) << 3) + steps;
                magnitude.min(0x7e) | if value.is_sign_negative() { 0x80 } else { 0 }
            }
        }
    }
}

/// 2^n.
fn exp2(n: i32) -> f64 {
    2f64.powi(n)
}

/// How the program multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// By `wgmma`, with A in registers.
    Registers,
    /// By `wgmma`, with A in shared memory.
    Shared,
    /// By `mma.sync`, one in each of four warps.
    MmaSync,
}

/// Which results of a case the file keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It keeps every accumulator.
    Bits,
    /// It keeps a digest of two words for each so many tiles.
    Digests(usize),
}

/// Tiles of accumulators that ask one question.
pub struct Case {
    pub name: String,
    pub format: Format,
    pub tiles: usize,
    /// How many instructions follow each other in each tile.
    pub steps: usize,
    /// How many steps have operands of their own: all, or one whose operands every step uses.
    stored: usize,
    /// Whether the first step adds to C.
    accumulate: bool,
    form: Form,
    pub kept: Kept,
    /// Matrix A as [tile][step][row][byte of k].
    a: Vec<u8>,
    /// Matrix B as [tile][step][column][byte of k].
    b: Vec<u8>,
    /// The bits of C as [tile][row][column].
    c: Vec<u32>,
}

impl Case {
    /// A case whose operands are functions of tile, step, row or column, and k. C is a function of
    /// tile, row and column. All give bits.
    pub fn new(
        format: Format,
        name: &str,
        [tiles, stored]: [usize; 2],
        mut a: impl FnMut([usize; 4]) -> u32,
        mut b: impl FnMut([usize; 4]) -> u32,
        mut c: impl FnMut([usize; 3]) -> u32,
    ) -> Case {
        let bytes = STEP / format.k();
        let operand = |rows: usize, element: &mut dyn FnMut([usize; 4]) -> u32| {
            let mut image = Vec::with_capacity(tiles * stored * rows * STEP);
            for index in 0..tiles * stored * rows * format.k() {
                let (row, k) = (index / format.k(), index % format.k());
                let place = [row / rows / stored, row / rows % stored, row % rows, k];
                image.extend_from_slice(&element(place).to_le_bytes()[..bytes]);
            }
            image
        };
        let (a, b) = (operand(ROWS, &mut a), operand(COLUMNS, &mut b));
        let places = (0..tiles * ROWS * COLUMNS).map(|i| [i / COLUMNS / ROWS, i / COLUMNS % ROWS, i % COLUMNS]);
        Case {
            name: format!("{}: {name}", format.name()),
            format,
            tiles,
            steps: stored,
            stored,
            accumulate: true,
            form: Form::Registers,
            kept: Kept::Bits,
            a,
            b,
            c: places.map(&mut c).collect(),
        }
    }

    /// A case of one tile. Functions give its values: `a(row, k)`, `b(column, k)` and
    /// `c(row, column)`.
    pub fn question(
        format: Format,
        name: &str,
        a: impl Fn(usize, usize) -> f64,
        b: impl Fn(usize, usize) -> f64,
        c: impl Fn(usize, usize) -> f64,
    ) -> Case {
        Case::new(
            format,
            name,
            [1, 1],
            |[_, _, row, k]| format.bits(a(row, k)),
            |[_, _, column, k]| format.bits(b(column, k)),
            |[_, row, column]| (c(row, column) as f32).to_bits(),
        )
    }

    /// The entry of the program that runs this case.
    pub fn entry(&self) -> String {
        let form = match self.form {
            Form::Registers => "registers",
            Form::Shared => "shared",
            Form::MmaSync => "mma_sync",
        };
        format!("{}_{form}", self.format.name())
    }

    pub fn launch(&self) -> LaunchConfig {
        LaunchConfig { grid: [self.tiles as u32, 1, 1], block: [128, 1, 1], shared_bytes: 0 }
    }

    /// The numbers that the program takes: steps, steps stored, and whether to accumulate.
    pub fn numbers(&self) -> [u32; 3] {
        [self.steps as u32, self.stored as u32, self.accumulate as u32]
    }

    /// A as the program reads it: 16 bytes for each thread and step. They are the fragment of the
    /// thread, or its chunk of the tile in shared memory.
    pub fn image_of_a(&self) -> Vec<u8> {
        let mut image = Vec::with_capacity(self.a.len());
        for tile in self.a.chunks(ROWS * STEP) {
            for thread in 0..128 {
                if self.form == Form::Shared {
                    image.extend_from_slice(&tile[thread % 64 * STEP + thread / 64 * 16..][..16]);
                    continue;
                }
                for register in 0..4 {
                    // A register holds 4 bytes of k in every format, so the place in bytes is twice
                    // that of 16 bits.
                    let (row, k) = place_in_a(thread, register);
                    image.extend_from_slice(&tile[row * STEP + 2 * k..][..4]);
                }
            }
        }
        image
    }

    /// B as the program reads it: 16 chunks of 16 bytes for each step, the first half of k first.
    pub fn image_of_b(&self) -> Vec<u8> {
        let chunk = |tile: &[u8], i: usize| <[u8; 16]>::try_from(&tile[i % 8 * STEP + i / 8 * 16..][..16]).expect("16");
        self.b.chunks(COLUMNS * STEP).flat_map(|tile| (0..16).flat_map(move |i| chunk(tile, i))).collect()
    }

    /// C as the program reads it: four accumulators for each thread.
    pub fn image_of_c(&self) -> Vec<u8> {
        let tiles = self.c.chunks(ROWS * COLUMNS);
        tiles.flat_map(|tile| (0..ROWS * COLUMNS).flat_map(|i| tile[place(i)].to_le_bytes())).collect()
    }

    /// What the file keeps of the accumulators that the program wrote.
    pub fn results(&self, image: &[u8]) -> Vec<u32> {
        let mut found = vec![0; image.len() / 4];
        for (i, word) in image.as_chunks::<4>().0.iter().enumerate() {
            found[i / (ROWS * COLUMNS) * ROWS * COLUMNS + place(i % (ROWS * COLUMNS))] = u32::from_le_bytes(*word);
        }
        match self.kept {
            Kept::Bits => found,
            Kept::Digests(tiles) => {
                let groups = found.chunks(tiles * ROWS * COLUMNS);
                let digests = groups.map(|group| digest(group.iter().flat_map(|word| word.to_le_bytes())));
                digests.flat_map(|digest| [digest as u32, (digest >> 32) as u32]).collect()
            }
        }
    }

    /// How many words [`Case::results`] gives.
    fn words(&self) -> usize {
        match self.kept {
            Kept::Bits => self.c.len(),
            Kept::Digests(tiles) => 2 * self.tiles.div_ceil(tiles),
        }
    }

    /// A digest of everything that the results depend on.
    fn digest(&self) -> u64 {
        let numbers = self.numbers().into_iter().chain([(self.form == Form::Shared) as u32]);
        let c = self.c.iter().copied();
        digest(self.a.iter().chain(&self.b).copied().chain(numbers.chain(c).flat_map(u32::to_le_bytes)))
    }

    /// The results of the emulator.
    pub fn emulate(&self, module: &Module) -> Vec<u32> {
        let mut memory = Memory::new();
        let mut place = |bytes: &[u8]| {
            let address = memory.alloc(bytes.len() as u64, 256).expect("memory");
            memory.write(address, bytes).expect("memory");
            address
        };
        let c = self.image_of_c();
        let out = place(&c);
        let pointers = [out, place(&self.image_of_a()), place(&self.image_of_b()), place(&c)];
        let mut params: Vec<u8> = pointers.into_iter().flat_map(u64::to_le_bytes).collect();
        params.extend(self.numbers().into_iter().flat_map(u32::to_le_bytes));
        let launched = module.launch(&memory, &self.entry(), self.launch(), &params);
        launched.unwrap_or_else(|fault| panic!("{}: {fault}", self.name));
        self.results(&memory.read(out, c.len() as u64).expect("memory"))
    }

    /// What an accumulator was computed from: the bits of a row of A and a column of B, in a step,
    /// and of C.
    pub fn operands(&self, accumulator: usize, step: usize) -> (Vec<u32>, Vec<u32>, u32) {
        let (tile, row, column) = (accumulator / COLUMNS / ROWS, accumulator / COLUMNS % ROWS, accumulator % COLUMNS);
        let step = tile * self.stored + step % self.stored;
        let elements = |image: &[u8], row: usize| {
            let bytes = STEP / self.format.k();
            let row = &image[row * STEP..][..STEP];
            row.chunks(bytes).map(|x| x.iter().rev().fold(0, |bits, byte| bits << 8 | *byte as u32)).collect()
        };
        (elements(&self.a, step * ROWS + row), elements(&self.b, step * COLUMNS + column), self.c[accumulator])
    }
}

/// The index in a tile, row by row, of accumulator `i` in the program's order: by thread, then
/// register.
fn place(i: usize) -> usize {
    let (row, column) = place_in_d(i / 4, i % 4);
    row * COLUMNS + column
}

/// The hash FNV-1a.
fn digest(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x100_0000_01b3))
}

/// The program by `wgmma`. Its entries `FORMAT_registers` and `FORMAT_shared` differ in where
/// A lies.
pub fn program(formats: &[Format]) -> String {
    let mut text = String::from(".version 8.3\n.target sm_90a\n.address_size 64\n");
    for format in formats {
        for shared in [false, true] {
            let (store_a, a) = if shared {
                ("st.shared.v4.b32 [%r7], {%a0, %a1, %a2, %a3};", "%rd6")
            } else {
                ("", "{%a0, %a1, %a2, %a3}")
            };
            let transposes = match (format, shared) {
                (Format::E4m3, _) => "",
                (_, false) => ", 0",
                (_, true) => ", 0, 0",
            };
            let (name, k) = (format.name(), format.k());
            let place = if shared { "shared" } else { "registers" };
            text += &format!(
                "
.visible .entry {name}_{place}(
    .param .u64 out, .param .u64 a, .param .u64 b, .param .u64 c,
    .param .u32 steps, .param .u32 stored, .param .u32 accumulate
) .maxntid 128 {{
    .reg .pred %p<4>; .reg .b32 %r<16>, %a<4>, %b<4>; .reg .b64 %rd<16>; .reg .f32 %d<4>;
    .shared .align 128 .b8 tiles[2304];
    ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [a]; ld.param.u64 %rd3, [b]; ld.param.u64 %rd4, [c];
    ld.param.u32 %r1, [steps]; ld.param.u32 %r2, [stored]; ld.param.u32 %r3, [accumulate];
    mov.u32 %r4, %tid.x; mov.u32 %r5, %ctaid.x;
    // B takes the first 256 bytes of shared memory, and A the next 2048. Each thread stores a chunk
    // of 16 bytes.
    mov.u32 %r6, tiles; mad.lo.u32 %r7, %r4, 16, %r6; add.u32 %r8, %r7, 0; add.u32 %r7, %r7, 256;
    // A descriptor has the start, the bytes between halves of k, and those between groups of 8
    // rows.
    cvt.u64.u32 %rd5, %r6; and.b64 %rd5, %rd5, 0x3ffff; shr.u64 %rd5, %rd5, 4;
    add.s64 %rd6, %rd5, 16; or.b64 %rd5, %rd5, 0x1000080000; or.b64 %rd6, %rd6, 0x800400000;
    // C and the output have 16 bytes for each thread. A and B have all stored steps of one tile
    // after those of the other.
    mad.lo.u32 %r9, %r5, 128, %r4; mad.wide.u32 %rd1, %r9, 16, %rd1; mad.wide.u32 %rd4, %r9, 16, %rd4;
    mul.lo.u32 %r9, %r5, %r2; mad.lo.u32 %r10, %r9, 128, %r4; mad.wide.u32 %rd2, %r10, 16, %rd2;
    mad.lo.u32 %r10, %r9, 16, %r4; mad.wide.u32 %rd3, %r10, 16, %rd3;
    setp.eq.u32 %p1, %r2, 1; selp.b64 %rd7, 0, 2048, %p1; selp.b64 %rd8, 0, 256, %p1;
    ld.global.v4.f32 {{%d0, %d1, %d2, %d3}}, [%rd4];
    setp.lt.u32 %p1, %r4, 16; setp.ne.u32 %p2, %r3, 0; mov.u32 %r9, 0;
STEP:
    ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%rd2];
    @%p1 ld.global.v4.b32 {{%b0, %b1, %b2, %b3}}, [%rd3];
    @%p1 st.shared.v4.b32 [%r8], {{%b0, %b1, %b2, %b3}};
    {store_a}
    fence.proxy.async; bar.sync 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k{k}.f32.{name}.{name} {{%d0, %d1, %d2, %d3}}, {a}, %rd5, %p2, 1, 1{transposes};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    bar.sync 0;
    add.s64 %rd2, %rd2, %rd7; add.s64 %rd3, %rd3, %rd8;
    add.u32 %r9, %r9, 1; setp.ne.u32 %p2, %r9, 0; setp.lt.u32 %p3, %r9, %r1; @%p3 bra STEP;
    st.global.v4.f32 [%rd1], {{%d0, %d1, %d2, %d3}};
    ret;
}}
"
            );
        }
    }
    text
}

/// The program by `mma.sync`, for formats of 16 bits. Its entries `FORMAT_mma_sync` take what those
/// of [`program`] take. Each of four warps has 16 rows of the tile.
pub fn mma_sync_program(formats: &[Format]) -> String {
    let mut text = String::from(".version 7.0\n.target sm_80\n.address_size 64\n");
    for format in formats {
        let name = format.name();
        text += &format!(
            "
.visible .entry {name}_mma_sync(
    .param .u64 out, .param .u64 a, .param .u64 b, .param .u64 c,
    .param .u32 steps, .param .u32 stored, .param .u32 accumulate
) .maxntid 128 {{
    .reg .pred %p<3>; .reg .b32 %r<8>, %a<4>, %b<2>; .reg .b64 %rd<8>; .reg .f32 %d<4>;
    ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [a]; ld.param.u64 %rd3, [b]; ld.param.u64 %rd4, [c];
    ld.param.u32 %r1, [steps]; ld.param.u32 %r2, [stored]; ld.param.u32 %r3, [accumulate];
    mov.u32 %r4, %tid.x; mov.u32 %r5, %ctaid.x;
    // C and the output have 16 bytes for each thread. A and B have all stored steps of one tile
    // after those of the other.
    mad.lo.u32 %r6, %r5, 128, %r4; mad.wide.u32 %rd1, %r6, 16, %rd1; mad.wide.u32 %rd4, %r6, 16, %rd4;
    mul.lo.u32 %r6, %r5, %r2; mad.lo.u32 %r7, %r6, 128, %r4; mad.wide.u32 %rd2, %r7, 16, %rd2;
    // A column's chunk of 8 k lies after that of the column before. So the word of each lane lies
    // after that of the lane before.
    mad.wide.u32 %rd3, %r6, 256, %rd3; and.b32 %r4, %r4, 31; mad.wide.u32 %rd3, %r4, 4, %rd3;
    setp.eq.u32 %p1, %r2, 1; selp.b64 %rd5, 0, 2048, %p1; selp.b64 %rd6, 0, 256, %p1;
    ld.global.v4.f32 {{%d0, %d1, %d2, %d3}}, [%rd4];
    setp.ne.u32 %p1, %r3, 0; @%p1 bra BEGIN;
    mov.f32 %d0, 0f00000000; mov.f32 %d1, 0f00000000; mov.f32 %d2, 0f00000000; mov.f32 %d3, 0f00000000;
BEGIN:
    mov.u32 %r6, 0;
STEP:
    ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%rd2];
    ld.global.b32 %b0, [%rd3]; ld.global.b32 %b1, [%rd3+128];
    mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32
        {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {{%d0, %d1, %d2, %d3}};
    add.s64 %rd2, %rd2, %rd5; add.s64 %rd3, %rd3, %rd6;
    add.u32 %r6, %r6, 1; setp.lt.u32 %p2, %r6, %r1; @%p2 bra STEP;
    st.global.v4.f32 [%rd1], {{%d0, %d1, %d2, %d3}};
    ret;
}}
"
        );
    }
    text
}

/// The cases of a format of 16 bits, by `mma.sync`. They have the names and operands of those by
/// `wgmma` that have A in registers.
pub fn mma_sync_cases(format: Format) -> Vec<Case> {
    let by_wgmma = cases(format).into_iter().filter(|case| case.form == Form::Registers);
    by_wgmma.map(|case| Case { form: Form::MmaSync, ..case }).collect()
}

/// All cases of a format, by `wgmma`.
pub fn cases(format: Format) -> Vec<Case> {
    let mut cases = questions(format);
    cases.extend(samples(format));
    cases.extend(chains(format));
    cases
}

/// Dot products whose results differ between hypotheses, one tile for each question. Sweeps run
/// over rows, and variants over columns.
fn questions(format: Format) -> Vec<Case> {
    let (k_count, kept) = (format.k(), format.kept());
    let (smallest, largest, fraction) = format.range();
    // The largest term is a product of 2^(2 one). Smaller products have the exponent `low` in B.
    let (one, low) = if format == Format::E4m3 { (4, -5) } else { (5, -12) };
    let unit = exp2(2 * one);
    let small = |below: i32| exp2(2 * one - below - low);
    let sign = |negative: bool| if negative { -1.0 } else { 1.0 };
    let half = k_count / 2;
    let places = |column: usize, k: usize| match column {
        0 => k == 0,
        1 => k == k_count - 1,
        2 => k < 2,
        3 => k < k_count / 4,
        4 => k < half,
        5 => k >= half,
        6 => k.is_multiple_of(2),
        _ => true,
    };
    let ulp = exp2(-23);
    let mantissas = [1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875];
    let mut cases = vec![
        Case::question(
            format,
            "equal products beside an accumulator of 1: how many bits, which group, which signs",
            |row, _| sign(row / 16 % 2 == 1) * small(kept - 7 + row as i32 % 16),
            |column, k| if places(column, k) { exp2(low) } else { 0.0 },
            |row, _| sign(row / 32 == 1) * unit,
        ),
        Case::question(
            format,
            "equal products beside an accumulator of many bits",
            |row, _| sign(row / 16 % 2 == 1) * small(kept - 7 + row as i32 % 16),
            |column, k| if places(column, k) { exp2(low) } else { 0.0 },
            |row, _| unit * if row / 32 == 1 { 2.0 - ulp } else { 1.0 + ulp },
        ),
        {
            let top = largest.min(15);
            let scale = if format == Format::E4m3 { 1.0 } else { exp2(-4) };
            let place = [0, 1, k_count / 4, half - 1, half, half + half / 2, k_count - 2, k_count - 1];
            Case::question(
                format,
                "equal products beside a larger product, at every place",
                move |row, k| exp2(if k == place[row / 8] { top } else { top - (kept - 3 + row as i32 % 8) }),
                move |column, k| {
                    scale
                        * match column {
                            0 => 1.0,
                            1 => 1.5,
                            2 => 1.75,
                            3 => sign(k % 2 == 1),
                            4 => (k < half) as u8 as f64,
                            5 => (k >= half) as u8 as f64,
                            6 => (k % 2 == 0) as u8 as f64,
                            _ => (k < 2 || k >= k_count - 2) as u8 as f64,
                        }
                },
                |_, _| 0.0,
            )
        },
        {
            let place = [0, half - 1, half, k_count - 1];
            let c = [1.0, 1.5, 2.0 - ulp, 1.0 + ulp, -1.0, -1.5, ulp - 2.0, -1.0 - ulp];
            Case::question(
                format,
                "an accumulator beside a larger product: is it cut like one",
                move |row, k| if k == place[row / 16] { exp2(one) } else { 0.0 },
                |_, _| exp2(one),
                move |row, column| c[column] * exp2(2 * one - (kept - 7 + row as i32 % 16)),
            )
        },
        {
            let (top, scale) = if format == Format::E4m3 { (7, 1.0) } else { (14, exp2(-4)) };
            Case::question(
                format,
                "a largest product of two or more: is its exponent normalised",
                move |row, k| {
                    if k == 0 { mantissas[row / 8] * exp2(top) } else { exp2(top - (kept - 5 + row as i32 % 8)) }
                },
                move |column, k| scale * if k == 0 { mantissas[column] } else { 1.0 },
                |_, _| 0.0,
            )
        },
        {
            let c = [1.0, 1.0 + ulp, 2.0 - ulp, 1.5 + ulp];
            let factor = [1.0, -1.0, 1.5, -1.5, 1.25, 1.75, 1.125, -1.875];
            Case::question(
                format,
                "bits below the last of the result: cut or rounded",
                move |row, k| if k < 4 && row >> k & 1 == 1 { small(kept - 3 + k as i32) } else { 0.0 },
                move |column, _| factor[column] * exp2(low),
                move |row, _| c[row / 16] * unit,
            )
        },
        {
            let full = 2.0 - exp2(-fraction);
            Case::question(
                format,
                "the largest mantissas everywhere: carries",
                move |row, k| if k < k_count * (row / 8 + 1) / 8 { full } else { 0.0 },
                move |column, k| match column {
                    0 => full,
                    1 => -full,
                    2 => sign(k % 2 == 1) * full,
                    3 => full - exp2(-fraction),
                    4 => sign(k == 0) * full,
                    5 => sign(k != 0) * full,
                    6 => full / 2.0,
                    _ => 1.0,
                },
                |row, column| sign(column % 2 == 1) * (2.0 - ulp) * exp2(row as i32 % 8 - 3),
            )
        },
        {
            let (high, steps) = if format == Format::E4m3 { (8, 17) } else { (15, 31) };
            Case::question(
                format,
                "large terms that cancel, and 1",
                move |row, k| {
                    if k == 0 || k == 1 || k == half {
                        exp2(row as i32 % 32 % steps - high)
                    } else if row < 32 {
                        1.0
                    } else {
                        1.75
                    }
                },
                move |column, k| {
                    let (plus, minus, rest) = match column {
                        0 => (0, 1, 2),
                        1 => (0, half, 2),
                        2 => (0, 1, k_count - 1),
                        3 => (0, half, k_count - 1),
                        4 => (1, k_count, 2),
                        5 => (half, k_count, 2),
                        6 => (0, 1, k_count),
                        _ => (0, half, k_count),
                    };
                    if k == plus {
                        exp2(high)
                    } else if k == minus {
                        -exp2(high)
                    } else if k == rest {
                        1.0
                    } else {
                        0.0
                    }
                },
                move |row, column| match column {
                    4 | 5 => -exp2(row as i32 % 32 % steps),
                    6 => 1.0,
                    7 => 1.5,
                    _ => 0.0,
                },
            )
        },
        {
            let b = if format == Format::E4m3 { -6 } else { -14 };
            Case::question(
                format,
                "a zero times a large number: has the product an exponent",
                move |row, k| match (row / 16, k) {
                    (1, 0) | (2, 1) => -0.0,
                    (_, 0 | 1) => 0.0,
                    _ => exp2(if format == Format::E4m3 { -(row as i32 % 8) } else { -4 - row as i32 % 16 }),
                },
                move |column, k| exp2(if k < 2 { largest - column as i32 } else { b }),
                |row, _| if row / 16 == 3 { exp2(-30) } else { 0.0 },
            )
        },
        {
            let high = largest.min(100);
            let cut = smallest + high - kept;
            let normal = smallest.max(-14);
            Case::question(
                format,
                "a subnormal operand: is its exponent normalised",
                move |row, k| match (k, row / 16) {
                    (0, 2) => exp2(smallest - 1) + exp2(smallest - 1 - row as i32 % 16 % fraction),
                    (0, _) => exp2(smallest - 1 - row as i32 % 16 % fraction),
                    (_, 1) => -exp2(normal),
                    _ => exp2(normal),
                },
                move |column, k| exp2(if k == 0 { high } else { cut - normal + 3 - column as i32 }),
                move |row, _| if row / 16 == 3 { exp2(cut + 2) } else { 0.0 },
            )
        },
        Case::question(
            format,
            "an accumulator below the smallest normal",
            |row, k| {
                let negative = sign((row + k) % 3 == 0);
                match format {
                    Format::Bf16 => negative * mantissas[k % 8] * exp2(-66 - row as i32 % 16),
                    _ if row < 32 => negative * 0.0,
                    _ => negative * exp2(smallest - fraction),
                }
            },
            |column, _| match format {
                Format::Bf16 => mantissas[column] * exp2(-64),
                _ => exp2(smallest - fraction) * (column % 2) as f64,
            },
            |row, column| sign(row % 2 == 1) * exp2(-149) * (row * 131_071 + column * 1021 + 1) as f64,
        ),
    ];
    if format == Format::Bf16 {
        cases.push(Case::question(
            format,
            "products below the smallest normal",
            |row, k| mantissas[if row < 32 { 0 } else { k % 8 }] * exp2(-70 - row as i32 % 32),
            |column, _| sign(column % 2 == 1) * exp2(-68 - column as i32),
            |row, _| if row % 4 == 3 { exp2(-149) * 5.0 } else { 0.0 },
        ));
        let c = [f32::MAX as f64, -f32::MAX as f64, 0.0, exp2(127)];
        cases.push(Case::question(
            format,
            "overflow, of the sum and of products",
            |row, k| if k == 2 { 1.0 } else { exp2(96 + 2 * (row as i32 % 16)) },
            move |column, k| match (column, k) {
                (0, 0) => 1.0,
                (1, 0) => -1.0,
                (2, k) if k != 2 => 1.0,
                (3, k) if k != 2 => sign(k % 2 == 1),
                (4, 0) => 16.0,
                (5, 0) => exp2(100),
                (5, 1) => -exp2(100),
                (5, 2) => 1.0,
                (6, 0) => exp2(100),
                (6, 1) => -exp2(99),
                (7, 0) => 1.984375,
                (7, 1) => 1.9921875 * exp2(-20),
                _ => 0.0,
            },
            move |row, _| c[row / 16],
        ));
    }

    let specials = match format {
        Format::Bf16 => [0x7f80, 0xff80, 0x7fc0, 0xffd3, 0x7f81, 0x0000, 0x8000, 0x3f80],
        Format::F16 => [0x7c00, 0xfc00, 0x7e00, 0xfe53, 0x7c01, 0x0000, 0x8000, 0x3c00],
        Format::E4m3 => [0x7e, 0xfe, 0x7f, 0xff, 0x01, 0x00, 0x80, 0x38],
    };
    let sums = [0, 0x3f80_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0xffc1_2345, 0x7f80_0001, 0x7f7f_ffff];
    let [plus, minus, zero] = [format.bits(1.0), format.bits(-1.0), 0];
    cases.push(Case::new(
        format,
        "infinities and NaN: one product and an accumulator",
        [1, 1],
        |[_, _, row, k]| if k == 3 { specials[row / 8] } else { zero },
        |[_, _, column, k]| if k == 3 { specials[column] } else { plus },
        |[_, row, _]| sums[row % 8],
    ));
    cases.push(Case::new(
        format,
        "infinities and NaN: two products and an accumulator",
        [1, 1],
        |[_, _, row, k]| match k {
            0 => specials[row / 8],
            9 => specials[row % 8],
            _ => plus,
        },
        |[_, _, column, k]| if column % 2 == 1 && k == 9 { minus } else { plus },
        |[_, _, column]| sums[column / 2],
    ));
    for (accumulate, name) in [(true, "signs of zero"), (false, "signs of zero, without the accumulator")] {
        let mut case = Case::new(
            format,
            name,
            [1, 1],
            |[_, _, row, k]| match (row >> 1 & 1, k) {
                (1, 0) => plus,
                (1, 1) => minus,
                _ if row & 1 == 1 || (row & 8 != 0 && k % 2 == 1) => format.bits(-0.0),
                _ => zero,
            },
            |[_, _, column, k]| match column {
                0 => plus,
                1 => minus,
                2 => [plus, minus][k % 2],
                3 => zero,
                4 => format.bits(-0.0),
                5 => [zero, plus][(k < 2) as usize],
                6 => [minus, plus][(k < 2) as usize],
                _ => format.bits(exp2(smallest - fraction)),
            },
            |[_, row, _]| match (accumulate, row >> 2 & 1) {
                (false, _) => 0x7fc0_0000,
                (true, sign) => (sign as u32) << 31,
            },
        );
        case.accumulate = accumulate;
        cases.push(case);
    }
    cases
}

/// The sum of twelve uniform numbers, less six. It is almost normal, and exact.
pub fn normal(random: &mut Random) -> f64 {
    (0..12).map(|_| (random.bits() >> 40) as f64 * exp2(-24)).sum::<f64>() - 6.0
}

/// A uniform integer from `low` to `high`.
fn integer(random: &mut Random, low: i32, high: i32) -> i32 {
    low + (random.bits() >> 33) as i32 % (high - low + 1)
}

/// A random sign and mantissa of 24 bits, with the exponent given.
fn scaled(random: &mut Random, exponent: i32) -> f64 {
    let magnitude = 1.0 + (random.bits() >> 41) as f64 * exp2(-23);
    exp2(exponent) * if random.bits() & 1 == 1 { -magnitude } else { magnitude }
}

/// Random tiles of several distributions. Of a few every bit is kept, of many a digest.
fn samples(format: Format) -> Vec<Case> {
    let (smallest, largest, fraction) = format.range();
    let kept = format.kept();
    let tiny = smallest.max(-60);
    type Element = Box<dyn Fn(&mut Random) -> f64>;
    let wide = if format == Format::E4m3 { 6 } else { 12 };
    let distributions: [(&str, Element, Element, Element); 7] = [
        ("normal", Box::new(normal), Box::new(normal), Box::new(|r| 4.0 * normal(r))),
        (
            "weights times normal beside a large accumulator",
            Box::new(|r| (r.bits() >> 40) as f64 * exp2(-24)),
            Box::new(normal),
            Box::new(|r| 200.0 * normal(r)),
        ),
        (
            "wide exponents",
            Box::new(move |r| {
                let e = integer(r, -wide, wide);
                scaled(r, e)
            }),
            Box::new(move |r| {
                let e = integer(r, -wide, wide.min(8));
                scaled(r, e)
            }),
            Box::new(move |r| {
                let e = integer(r, -2 * wide, 2 * wide);
                scaled(r, e)
            }),
        ),
        (
            "products about the last bit beside an accumulator",
            Box::new(move |r| {
                let e = integer(r, 9 - kept, 4);
                scaled(r, e.max(smallest))
            }),
            Box::new(move |r| {
                let e = integer(r, -5, 0);
                scaled(r, e)
            }),
            Box::new(|r| {
                let e = integer(r, 2, 6);
                scaled(r, e)
            }),
        ),
        (
            "products larger than the accumulator",
            Box::new(|r| {
                let e = integer(r, 0, 3);
                scaled(r, e)
            }),
            Box::new(|r| {
                let e = integer(r, 0, 3);
                scaled(r, e)
            }),
            Box::new(move |r| {
                let e = integer(r, -kept, 3);
                scaled(r, e)
            }),
        ),
        (
            "subnormal operands",
            Box::new(move |r| {
                let e = integer(r, smallest - fraction, smallest + 2);
                scaled(r, e)
            }),
            Box::new(move |r| {
                let e = integer(r, -4, largest.min(100));
                scaled(r, e)
            }),
            Box::new(move |r| {
                let e = integer(r, tiny - 20, tiny + 10);
                scaled(r, e)
            }),
        ),
        (
            "every exponent",
            Box::new(move |r| {
                let e = integer(r, smallest, largest - 1);
                scaled(r, e)
            }),
            Box::new(move |r| {
                let e = integer(r, smallest, largest - 1);
                scaled(r, e)
            }),
            Box::new(move |r| {
                let e = integer(r, 2 * smallest.max(-63), 2 * largest.min(63));
                scaled(r, e)
            }),
        ),
    ];
    let mut cases = Vec::new();
    let tiles = if format == Format::E4m3 { 2 } else { 3 };
    for (seed, (name, a, b, c)) in distributions.iter().enumerate() {
        for (tiles, kept) in [(tiles, Kept::Bits), (256, Kept::Digests(8))] {
            let [mut r, mut s, mut t] = [1, 2, 3].map(|i| Random((1000 * tiles + 10 * seed + i) as u64));
            let name = format!("random, {name}{}", if kept == Kept::Bits { "" } else { ", by digests" });
            let mut case = Case::new(
                format,
                &name,
                [tiles, 1],
                |_| format.bits(a(&mut r)),
                |_| format.bits(b(&mut s)),
                |_| (c(&mut t) as f32).to_bits(),
            );
            case.kept = kept;
            cases.push(case);
        }
    }
    for (tiles, kept) in [(tiles, Kept::Bits), (256, Kept::Digests(8))] {
        // Two neighbouring products differ in their sign, and in the last bit of A at most.
        let [mut r, mut s, mut t] = [1, 2, 3].map(|i| Random(77 * tiles as u64 + i));
        let (mut last_a, mut last_b) = (0, 0);
        let sign = 1 << if format == Format::E4m3 { 7 } else { 15 };
        let name = format!("random, nearly cancelling{}", if kept == Kept::Bits { "" } else { ", by digests" });
        let mut case = Case::new(
            format,
            &name,
            [tiles, 1],
            |[_, _, _, k]| {
                last_a =
                    if k % 2 == 0 { format.bits(normal(&mut r)) } else { (last_a ^ sign) ^ (r.bits() >> 63) as u32 };
                last_a
            },
            |[_, _, _, k]| {
                last_b = if k % 2 == 0 { format.bits(normal(&mut s)) } else { last_b };
                last_b
            },
            |_| ((normal(&mut t) * exp2(-8)) as f32).to_bits(),
        );
        case.kept = kept;
        cases.push(case);
    }
    let [mut r, mut s, mut t] = [1, 2, 3].map(|i| Random(900 + i));
    let mut case = Case::new(
        format,
        "random, normal, A in shared memory",
        [2, 1],
        |_| format.bits(normal(&mut r)),
        |_| format.bits(normal(&mut s)),
        |_| (normal(&mut t) as f32).to_bits(),
    );
    case.form = Form::Shared;
    cases.push(case);
    cases
}

/// The keys of the longest clip: 31 frames of 3840 tokens.
pub const KEYS: usize = 119_040;

/// The name, without its format, of the chain that multiplies weights by values over [`KEYS`] keys.
pub const LONG: &str = "chain, weights times values of mean one over 119040 keys";

/// Cases of many steps into one accumulator.
fn chains(format: Format) -> Vec<Case> {
    let factor = [1.0, 0.5, 1.5, 0.125, -1.0, 1.25, 1.75, 1.875];
    let start = [0.0, 1.0, 100.0, 16384.0];
    let mut equal = Case::question(
        format,
        "chain, a thousand steps of equal products",
        |row, _| exp2(-(row as i32 % 16) / if format == Format::E4m3 { 2 } else { 1 }),
        move |column, _| factor[column],
        move |row, _| start[row / 16],
    );
    equal.steps = 1000;

    let [mut r, mut s] = [1, 2].map(|i| Random(5000 + i));
    let steps = KEYS / format.k();
    // The weights lie between 0 and 1, and most are small, as a softmax leaves them.
    let long = Case::new(
        format,
        LONG,
        [1, steps],
        |_| {
            let uniform = (r.bits() >> 40) as f64 * exp2(-24);
            format.bits(uniform * uniform * uniform)
        },
        |[_, _, column, _]| {
            format.bits(match column {
                0 => 1.0,
                1 => -1.0,
                2 => 1.0 + normal(&mut s) / 8.0,
                3 => 1.0 + normal(&mut s),
                4 => 4.0 + normal(&mut s),
                5 => normal(&mut s),
                6 => 1.5,
                _ => 0.25,
            })
        },
        |_| 0,
    );

    let [mut r, mut s, mut t] = [1, 2, 3].map(|i| Random(6000 + i));
    let normals = Case::new(
        format,
        "chain, 64 steps of normal operands",
        [2, 64],
        |_| format.bits(normal(&mut r)),
        |_| format.bits(normal(&mut s)),
        |_| (normal(&mut t) as f32).to_bits(),
    );
    vec![equal, long, normals]
}

/// What a GPU computed.
pub struct Results {
    /// The name of the GPU, and the version of its driver.
    pub device: String,
    cases: Vec<(String, u64, Vec<u32>)>,
}

const MAGIC: &str = "framestride wgmma results 1";

impl Results {
    pub fn new(device: String) -> Results {
        Results { device, cases: Vec::new() }
    }

    pub fn add(&mut self, case: &Case, results: Vec<u32>) {
        self.cases.push((case.name.clone(), case.digest(), results));
    }

    /// The results of a case.
    ///
    /// # Errors
    /// The file does not have the case, or has it with other operands, or another number of
    /// results.
    pub fn of(&self, case: &Case) -> Result<&[u32], String> {
        let wrong = |what: &str| Err(format!("{:?}: {what}: write the file anew with the probe", case.name));
        match self.cases.iter().find(|(name, ..)| *name == case.name) {
            None => wrong("no results"),
            Some((_, digest, _)) if *digest != case.digest() => wrong("the results are of other operands"),
            Some((.., results)) if results.len() != case.words() => wrong("too few or too many results"),
            Some((.., results)) => Ok(results),
        }
    }

    /// Checks that there are results of each of the cases, and of no others.
    ///
    /// # Errors
    /// There are no results, or those of a case are missing, wrong or too many.
    pub fn check(&self, cases: &[Case]) -> Result<(), String> {
        if self.cases.is_empty() {
            return Err("there are no results".into());
        }
        for (name, ..) in &self.cases {
            if !cases.iter().any(|case| case.name == *name) {
                return Err(format!("{name:?}: results of an unknown case"));
            }
        }
        cases.iter().try_for_each(|case| self.of(case).map(|_| ()))
    }

    /// The file: a line of magic, one of the device, and the cases. Each has a line of the number
    /// of words, digest and name, and then its words in little-endian bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{MAGIC}\n{}\n", self.device).into_bytes();
        for (name, digest, results) in &self.cases {
            bytes.extend(format!("{} {digest:016x} {name}\n", results.len()).bytes());
            bytes.extend(results.iter().flat_map(|word| word.to_le_bytes()));
        }
        bytes
    }

    /// Reads what [`Results::to_bytes`] wrote.
    ///
    /// # Errors
    /// The file is of another kind, or damaged.
    pub fn from_bytes(mut bytes: &[u8]) -> Result<Results, String> {
        fn line<'a>(bytes: &mut &'a [u8]) -> Result<&'a str, String> {
            let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("the file ends within a line")?;
            let (line, rest) = bytes.split_at(end);
            *bytes = &rest[1..];
            std::str::from_utf8(line).map_err(|error| error.to_string())
        }
        if line(&mut bytes)? != MAGIC {
            return Err(format!("not a file of results: it does not begin with {MAGIC:?}"));
        }
        let mut results = Results::new(line(&mut bytes)?.to_string());
        while !bytes.is_empty() {
            let head = line(&mut bytes)?;
            let mut parts = head.splitn(3, ' ');
            let mut part = || parts.next().ok_or(format!("the line {head:?} has fewer than three parts"));
            let count: usize = part()?.parse().map_err(|error| format!("the line {head:?}: {error}"))?;
            let digest = u64::from_str_radix(part()?, 16).map_err(|error| format!("the line {head:?}: {error}"))?;
            let name = part()?.to_string();
            let words = bytes.get(..4 * count).ok_or(format!("the file ends within the results of {name:?}"))?;
            bytes = &bytes[4 * count..];
            let words = words.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
            results.cases.push((name, digest, words));
        }
        Ok(results)
    }
}
