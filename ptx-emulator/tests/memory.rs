//! Loads, stores and atomics in every space, variables of a module, and the host's side of memory.

mod common;

use common::{HEADER, bytes32, kernel_with, launch, module, one_block, store, u32s, u64s, warp};
use ptx_emulator::{LaunchConfig, Memory, MemoryError, Module};

#[test]
fn host_memory() {
    let mut memory = Memory::new();
    let (a, b) = (memory.alloc(10, 1).unwrap(), memory.alloc(1 << 20, 4096).unwrap());
    assert_eq!((a % 256, b % 4096), (0, 0));
    assert_eq!(memory.read(a, 10).unwrap(), [0xff; 10], "fresh memory shows that nobody wrote it");
    memory.write(a + 1, &[1, 2, 3, 4, 5, 6, 7]).unwrap();
    assert_eq!(memory.read(a, 10).unwrap(), [0xff, 1, 2, 3, 4, 5, 6, 7, 0xff, 0xff]);
    memory.fill(a + 3, 2, 0).unwrap();
    assert_eq!(memory.read(a + 2, 4).unwrap(), [2, 0, 0, 5]);
    assert!(matches!(memory.read(a, 11), Err(MemoryError::Range { bytes: 11, .. })));
    assert!(
        memory.write(b + (1 << 20) - 1, &[0; 2]).unwrap_err().to_string().contains("does not lie in one allocation")
    );
    assert_eq!(memory.alloc(1, 3), Err(MemoryError::Alignment(3)));
    assert_eq!(memory.free(b + 1), Err(MemoryError::NotAllocated(b + 1)));
    memory.free(b).unwrap();
    assert!(memory.read(b, 1).is_err());
}

/// Kernels find the host's memory at its own addresses, beside allocations. Half a word is stored
/// without its other half.
#[test]
fn memory_of_the_host() {
    let body = "ld.global.u32 %r2, [%rd1]; ld.u16 %r3, [%rd1+6]; add.u32 %r2, %r2, %r3; st.global.u32 [%rd2], %r2;
                cvt.u16.u32 %h1, %r2; st.global.u16 [%rd1+10], %h1; atom.add.u32 %r4, [%rd1+12], 5;";
    let ptx = kernel_with("", "", body);
    let module = module(&ptx);
    let mut words = [100u32, 7 << 16, 0xaaaa_bbbb, 1];
    // SAFETY: launches use `words`, which live until the end, and an allocation.
    let mut memory = unsafe { Memory::with_host_memory() };
    let out = memory.alloc(4, 4).unwrap();
    let launch = |address: u64| {
        let params: Vec<u8> = [address, out].iter().flat_map(|address| address.to_le_bytes()).collect();
        module.launch(&memory, "test", one_block(1, 0), &params)
    };
    launch(words.as_mut_ptr().expose_provenance() as u64).unwrap();
    assert_eq!(words, [100, 7 << 16, 107 << 16 | 0xbbbb, 6]);
    let host = words.as_mut_ptr().expose_provenance() as u64;
    memory.write(host + 1, &[1, 2]).unwrap();
    assert_eq!(memory.read(host + 1, 4).unwrap(), [1, 2, 0, 0]);
    assert!(memory.read(0, 1).is_err());
    assert_eq!(u32s(&memory.read(out, 4).unwrap()), [107]);
    for nowhere in [0, 4096, 1 << 58] {
        let fault = launch(nowhere).unwrap_err().to_string();
        assert!(fault.contains("read of 4 bytes at global"), "{fault}");
    }
}

#[test]
fn every_width_through_every_space() {
    // Each lane writes a pattern of 32 bytes, and reads them back in other widths, with and without
    // signs.
    for (space, address, outside) in [
        ("global", "mad.wide.u32 %rd3, %r1, 32, %rd1; add.s64 %rd3, %rd3, 8192;", ""),
        (
            "shared",
            "mov.u32 %r3, buffer; mad.lo.u32 %r3, %r1, 32, %r3; cvt.u64.u32 %rd3, %r3;",
            ".shared .align 32 .b8 buffer[1024];",
        ),
        ("local", "mov.u64 %rd3, buffer;", ""),
    ] {
        let declaration = if space == "local" { ".local .align 16 .b8 buffer[32];" } else { "" };
        let generic =
            if space == "global" { "mov.u64 %rd4, %rd3;".to_string() } else { format!("cvta.{space}.u64 %rd4, %rd3;") };
        let body = format!(
            "{declaration} {address} {generic}
             mov.u32 %r4, 0x80f17f02; mov.u32 %r5, 0x11223344; add.u32 %r5, %r5, %r1; mov.b64 %rd5, {{%r4, %r5}};
             st.{space}.u8 [%rd3], %r5; st.{space}.b8 [%rd3+1], 0x9c; st.{space}.u16 [%rd3+2], 0xbeef;
             st.{space}.v2.u16 [%rd3+4], {{%h1, %h2}}; st.{space}.u32 [%rd3+4], %r4;
             st.v2.b32 [%rd4+8], {{%r4, %r5}}; st.{space}.v2.b64 [%rd3+16], {{%rd5, %rd5}};
             mad.wide.u32 %rd6, %r1, 64, %rd1;
             ld.{space}.s8 %r10, [%rd3]; ld.{space}.s8 %r11, [%rd3+1]; ld.u16 %r12, [%rd4+2]; ld.{space}.s16 %r13, [%rd3+2];
             st.global.v4.b32 [%rd6], {{%r10, %r11, %r12, %r13}};
             ld.{space}.v4.u8 {{%r10, %r11, %r12, %r13}}, [%rd3+4]; st.global.v4.b32 [%rd6+16], {{%r10, %r11, %r12, %r13}};
             ld.{space}.s32 %rd7, [%rd3+4]; ld.v2.u32 {{%r10, %r11}}, [%rd4+8]; st.global.v2.b64 [%rd6+32], {{%rd7, %rd5}};
             ld.{space}.v2.s16 {{%r12, %r13}}, [%rd3+20]; st.global.v4.b32 [%rd6+48], {{%r10, %r11, %r12, %r13}};"
        );
        let (out, _) = launch(&kernel_with(outside, "", &body), one_block(32, 0), &[], 16384).unwrap();
        for lane in 0..32 {
            let five = 0x1122_3344 + lane as u32;
            let expected = [
                five as u8 as i8 as i32 as u32,
                0xffff_ff9c,
                0xbeef,
                0xffff_beef,
                0x02,
                0x7f,
                0xf1,
                0x80,
                0x80f1_7f02,
                0xffff_ffff,
                0x80f1_7f02,
                five,
                0x80f1_7f02,
                five,
                five as u16 as i16 as i32 as u32,
                0x1122,
            ];
            assert_eq!(u32s(&out[lane * 64..][..64]), expected, "{space} lane {lane}");
        }
    }
}

#[test]
fn module_data_and_constants() {
    let ptx = format!(
        "{HEADER}.global .align 4 .u32 table[4] = {{1, 0x20, 3}};
         .const .align 8 .f32 constants[2] = {{0f3F800000, 2.5}};
         .global .align 8 .u64 pointers[2] = {{generic(table), table+4}};
         .global .align 1 .b8 text[3] = {{104, 105, -1}};
         .visible .global .u32 counter;
         .visible .entry test(.param .u64 out) {{
            .reg .b32 %r<9>; .reg .f32 %f<3>; .reg .b64 %rd<9>;
            ld.param.u64 %rd1, [out];
            ld.global.u32 %r1, [table+4]; ld.const.f32 %f1, [constants+4];
            ld.global.u64 %rd2, [pointers]; ld.u32 %r2, [%rd2+8]; ld.global.u64 %rd2, [pointers+8]; ld.global.u32 %r3, [%rd2];
            mov.u64 %rd3, text; ld.global.u8 %r4, [%rd3+1]; ld.global.nc.s8 %r5, [text+2]; ld.global.u32 %r6, [table+12];
            mov.u64 %rd4, constants; cvta.const.u64 %rd4, %rd4; ld.f32 %f2, [%rd4];
            atom.global.add.u32 %r7, [counter], 1;
            st.global.v4.b32 [%rd1], {{%r1, %r2, %r3, %r4}}; st.global.v2.b32 [%rd1+16], {{%r5, %r6}};
            st.global.v2.f32 [%rd1+24], {{%f1, %f2}}; st.global.u32 [%rd1+32], %r7; ret; }}"
    );
    let module = module(&ptx);
    let mut memory = Memory::new();
    let out = memory.alloc(36, 16).unwrap();
    for launch in 0..2 {
        module.launch(&memory, "test", one_block(1, 0), &out.to_le_bytes()).unwrap();
        let words = u32s(&memory.read(out, 36).unwrap());
        let expected = [0x20, 3, 0x20, 105, u32::MAX, 0, 2.5f32.to_bits(), 1f32.to_bits(), launch];
        assert_eq!(words, expected, "the counter outlives a launch");
    }
    assert!(Module::parse("m", &format!("{HEADER}.global .u64 p = nothing;")).unwrap_err().what.contains("`nothing`"));
    assert!(Module::parse("m", &format!("{HEADER}.global .u32 p[1] = {{1, 2}};")).unwrap_err().what.contains("longer"));
}

#[test]
fn dynamic_shared_memory_lies_behind_static_and_is_aligned() {
    let body = format!(
        "mov.u32 %r2, dynamic; mov.u32 %r3, fixed; and.b32 %r4, %r2, 1023; setp.ge.u32 %p1, %r2, %r3; selp.u32 %r5, 1, 0, %p1;
         mad.lo.u32 %r6, %r1, 4, %r2; st.shared.u32 [%r6], %r1; bar.sync 0;
         xor.b32 %r7, %r1, 31; mad.lo.u32 %r7, %r7, 4, %r2; ld.shared.u32 %r8, [%r7]; mad.lo.u32 %r8, %r5, 100, %r8;
         add.u32 %r8, %r8, %r4; {}",
        store("%r8")
    );
    let ptx = kernel_with(".extern .shared .align 1024 .b8 dynamic[];\n.shared .align 4 .b8 fixed[12];", "", &body);
    let (out, _) = launch(&ptx, one_block(32, 128), &[], 128).unwrap();
    assert_eq!(u32s(&out), (0..32).map(|lane| 100 + (31 - lane)).collect::<Vec<u32>>());
}

#[test]
fn atomics_of_every_kind() {
    // Lane i applies the operation with i + 1. The order of lanes does not matter for the result.
    let start = 7u32;
    for space in ["global", "shared"] {
        for (op, operand, expected) in [
            ("add.u32", "%r2", start + 528),
            ("min.s32", "%r2", 1),
            ("max.u32", "%r2", 32),
            ("and.b32", "%r2", 0),
            ("or.b32", "%r2", 63),
            ("xor.b32", "%r2", (1..=32).fold(start, |x, i| x ^ i)),
            ("inc.u32", "100", 39),
            ("inc.u32", "9", (start + 32) % 10),
            // The first step goes to 3, because 7 is above that.
            ("dec.u32", "3", 3 - 31 % 4),
        ] {
            let body = format!(
                "add.u32 %r2, %r1, 1; mov.u32 %r3, word; cvt.u64.u32 %rd3, %r3; setp.eq.u32 %p1, %r1, 0;
                 {pick} @%p1 st.{space}.u32 [%rd3], {start}; bar.sync 0;
                 red.{space}.{op} [%rd3], {operand}; bar.sync 0; ld.{space}.u32 %r4, [%rd3]; {}",
                store("%r4"),
                pick = if space == "global" { "add.s64 %rd3, %rd1, 128;" } else { "" }
            );
            let (out, _) =
                launch(&kernel_with(".shared .align 8 .b8 word[8];", "", &body), one_block(32, 0), &[], 256).unwrap();
            assert_eq!(u32s(&out)[0], expected, "{space} {op}");
        }
    }
}

#[test]
fn atomics_return_old_values_and_compare() {
    let body = format!(
        "atom.global.add.u32 %r2, [%rd1+256], 1; atom.global.exch.b32 %r3, [%rd1+260], %r1;
         atom.global.cas.b32 %r4, [%rd1+264], %r1, 77; atom.add.u64 %rd4, [%rd1+272], 0x100000001;
         atom.global.add.f32 %f1, [%rd1+280], 0f3F000000; red.global.add.noftz.bf16x2 [%rd1+284], %r10;
         atom.global.cas.b64 %rd5, [%rd1+288], 0, %rd4; atom.global.add.noftz.f16 %h1, [%rd1+298], %h2;
         red.global.add.v2.f32 [%rd1+304], {{%f5, %f6}}; {}",
        store("%r2")
    );
    let setup = "mov.u32 %r10, 0x3f804000; mov.b16 %h2, 0x3c00; mov.f32 %f5, 0f3F800000; mov.f32 %f6, 0f40000000;";
    let ptx = kernel_with("", "", &format!("{setup}{body}"));
    let (out, _) = launch(&ptx, one_block(32, 0), &[], 512).unwrap();
    let mut olds = u32s(&out[..128]);
    olds.sort_unstable();
    assert_eq!(olds, (0..32).collect::<Vec<u32>>(), "every lane saw another old value");
    let words = u32s(&out);
    assert_eq!(words[64], 32);
    assert_eq!(words[65], 31, "lanes take their turns in order");
    assert_eq!(words[66], 77, "lane 0 found its own number and wrote 77; the others did not find theirs");
    assert_eq!(u64s(&out)[34], 32 << 32 | 32);
    assert_eq!(f32::from_bits(words[70]), 16.0);
    assert_eq!(words[71], 0x4200_4280, "32 times (1, 2) in bf16: 32 and 64");
    assert_eq!(words[74], 0x5000 << 16, "32 times 1 in the upper f16, the lower untouched");
    assert_eq!((f32::from_bits(words[76]), f32::from_bits(words[77])), (32.0, 64.0));
}

#[test]
fn blocks_run_in_parallel_on_the_same_memory() {
    let body = "mov.u32 %r2, %ctaid.x; red.global.add.u32 [%rd1], 1; red.global.add.u64 [%rd1+8], 0x100000003;
                mad.wide.u32 %rd3, %r2, 2, %rd1; cvt.u16.u32 %h1, %r2; st.global.u16 [%rd3+16], %h1;";
    let grid = LaunchConfig { grid: [500, 1, 1], block: [32, 1, 1], shared_bytes: 0 };
    let (out, _) = launch(&kernel_with("", "", body), grid, &[], 1024).unwrap();
    assert_eq!(u32s(&out)[0], 16000);
    assert_eq!(u64s(&out)[1], 16000 << 32 | 48000);
    // Different blocks write neighbouring halves of a word.
    let halves: Vec<u16> = out[16..1016].chunks(2).map(|half| u16::from_le_bytes([half[0], half[1]])).collect();
    assert_eq!(halves, (0..500).collect::<Vec<u16>>());
}

#[test]
fn spaces_of_generic_addresses() {
    let body = format!(
        ".local .align 4 .b8 mine[4]; mov.u64 %rd3, word; cvta.shared.u64 %rd4, %rd3; cvta.to.shared.u64 %rd5, %rd4;
         mov.u64 %rd6, mine; cvta.local.u64 %rd7, %rd6;
         isspacep.shared %p1, %rd4; isspacep.global %p2, %rd4; isspacep.local %p3, %rd7; isspacep.global %p4, %rd1;
         setp.eq.u64 %p5, %rd3, %rd5;
         selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 2, 0, %p2; selp.u32 %r4, 4, 0, %p3; selp.u32 %r5, 8, 0, %p4; selp.u32 %r6, 16, 0, %p5;
         or.b32 %r2, %r2, %r3; or.b32 %r2, %r2, %r4; or.b32 %r2, %r2, %r5; or.b32 %r2, %r2, %r6; {}",
        store("%r2")
    );
    let (out, _) =
        launch(&kernel_with(".shared .align 8 .b8 word[8];", "", &body), one_block(32, 0), &[], 128).unwrap();
    assert_eq!(u32s(&out), [1 | 4 | 8 | 16; 32]);
}

#[test]
fn hints_and_prefetches_change_nothing() {
    let body = format!(
        "createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;
         ld.global.nc.L1::no_allocate.L2::128B.b32 %r2, [%rd2]; ld.global.L2::cache_hint.b32 %r3, [%rd2+4], %rd9;
         ld.relaxed.gpu.global.b32 %r4, [%rd2+8]; prefetch.global.L2 [%rd2]; cp.async.bulk.prefetch.L2.global [%rd2], 16;
         membar.gl; fence.acq_rel.gpu; fence.sc.cta; griddepcontrol.wait; griddepcontrol.launch_dependents; nanosleep.u32 100;
         add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; {}",
        store("%r2")
    );
    assert_eq!(warp(&body, &bytes32([1, 20, 300, 0])), [321; 32]);
}

#[test]
fn matrices_in_fragments() {
    // Element (r, c) of the 8 x 8 matrix has the value 8 r + c. A lane gets two neighbours of row
    // lane / 4.
    let body = |trans: &str| {
        format!(
            "mov.u32 %r2, tile; mad.lo.u32 %r3, %r1, 4, %r2; shl.b32 %r4, %r1, 1; add.u32 %r5, %r4, 1; shl.b32 %r5, %r5, 16;
             or.b32 %r4, %r4, %r5; st.shared.b32 [%r3], %r4; bar.sync 0; and.b32 %r6, %r1, 7; mad.lo.u32 %r6, %r6, 16, %r2;
             ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r7}}, [%r6];
             add.u32 %r8, %r6, 128; stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r8], {{%r7}}; bar.sync 0;
             ld.shared.b32 %r9, [%r3+128]; xor.b32 %r9, %r9, %r4; shl.b32 %r9, %r9, 1; add.u32 %r7, %r7, %r9; {}",
            store("%r7")
        )
    };
    for (trans, element) in [("", [8, 1]), (".trans", [1, 8])] {
        let ptx = kernel_with(".shared .align 16 .b8 tile[256];", "", &body(trans));
        let (out, _) = launch(&ptx, one_block(32, 0), &[], 128).unwrap();
        let at = |row: u32, column: u32| row * element[0] + column * element[1];
        let expected: Vec<u32> =
            (0..32).map(|lane| at(lane / 4, 2 * (lane % 4)) | at(lane / 4, 2 * (lane % 4) + 1) << 16).collect();
        assert_eq!(u32s(&out), expected, "{trans}: stored back, the tile is as it was");
    }
}

#[test]
fn one_two_or_four_matrices_of_rows_that_lie_anywhere() {
    // Row r of 32 has the elements 8 r to 8 r + 7, and lies at the place r * 13 modulo 32.
    let image: Vec<u8> = (0..32u16)
        .flat_map(|place| (0..8).flat_map(move |column| (place * 5 % 32 * 8 + column).to_le_bytes()))
        .collect();
    for (count, trans) in [(1, false), (2, false), (4, false), (1, true), (2, true), (4, true)] {
        let registers: Vec<String> = (0..count).map(|i| format!("%r{}", 10 + i)).collect();
        let stores: String = (0..count).map(|i| format!("st.global.b32 [%rd4+{}], %r{};", 4 * i, 10 + i)).collect();
        let trans_text = if trans { ".trans" } else { "" };
        // Lanes whose addresses are not needed have one that is not valid.
        let body = format!(
            "mov.u32 %r2, tile; mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %rd3, %r1, 16, %rd2;
             ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd3]; st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}}; bar.sync 0;
             mul.lo.u32 %r3, %r1, 13; and.b32 %r3, %r3, 31; mad.lo.u32 %r3, %r3, 16, %r2;
             setp.ge.u32 %p1, %r1, {}; selp.b32 %r3, 3, %r3, %p1;
             ldmatrix.sync.aligned.m8n8.x{count}{trans_text}.shared::cta.b16 {{{}}}, [%r3];
             mad.wide.u32 %rd4, %r1, 16, %rd1; {stores}",
            8 * count,
            registers.join(", ")
        );
        let ptx = kernel_with(".shared .align 16 .b8 tile[512];", "", &body);
        let (out, _) = launch(&ptx, one_block(32, 0), &image, 512).unwrap();
        for (lane, words) in u32s(&out).chunks(4).enumerate() {
            for (i, word) in words[..count].iter().enumerate() {
                // Lane 4 g + t has the elements 2 t and 2 t + 1 of row g, or of column g.
                let element = |n: usize| {
                    let (row, column) =
                        if trans { (2 * (lane % 4) + n, lane / 4) } else { (lane / 4, 2 * (lane % 4) + n) };
                    (8 * (8 * i + row) + column) as u32
                };
                assert_eq!(*word, element(0) | element(1) << 16, "x{count}{trans_text}, lane {lane}, register {i}");
            }
        }
    }
}
