//! Matrix products against a plain triple loop, for layouts, shapes and forms of operands. The
//! layouts are written here from the tables of the PTX ISA, independently of the emulator.

mod common;

use common::{HEADER, Random, launch, one_block, place_in_a, place_in_d};

/// How a matrix of M or N rows by k lies in shared memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// The bytes of a swizzled row: 32, 64 or 128; 0 without swizzle.
    swizzle: usize,
    /// Whether M or N is contiguous, in place of k.
    transpose: bool,
}

/// What the elements of A and B are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Element {
    Bf16,
    F16,
    E4m3,
}

use Element::{Bf16, E4m3, F16};

impl Element {
    fn bytes(self) -> usize {
        if self == E4m3 { 1 } else { 2 }
    }

    /// The bits of a random value, and the value. All terms of a product are multiples of 2^-8 below
    /// 2^11, or in e4m3 of 2^-2 below 2^12, so that tensor cores add them exactly in any order.
    fn random(self, random: &mut Random) -> (u16, f32) {
        let value =
            if self == E4m3 { (random.unit() * 7.9).trunc() / 2.0 } else { (random.unit() * 48.0).trunc() / 16.0 };
        let bits = match self {
            Bf16 => half::bf16::from_f32(value).to_bits(),
            F16 => half::f16::from_f32(value).to_bits(),
            E4m3 => {
                (0..256).find(|byte| common::e4m3(*byte) == value as f64).expect("a multiple of 1/2 below 4") as u16
            }
        };
        (bits, value)
    }
}

/// Rows and k are measured in elements of M or N, and in bytes of k.
impl Layout {
    /// The byte of an element in a tile of `rows` rows by `depth` of k.
    fn place(self, row: usize, k: usize, rows: usize, depth: usize) -> usize {
        let swizzled = |linear: usize| match self.swizzle {
            // The index of the 16-byte chunk is exclusive-ored with the row of the pattern of 8
            // rows.
            128 => linear ^ (linear / 128 % 8) << 4,
            64 => linear ^ (linear / 128 % 4) << 4,
            32 => linear ^ (linear / 128 % 2) << 4,
            _ => linear,
        };
        let (leading, stride) = self.offsets(rows, depth);
        match (self.transpose, self.swizzle) {
            // The core matrices have 8 rows of 16 bytes.
            (false, 0) => row / 8 * stride + k / 16 * leading + row % 8 * 16 + k % 16,
            (true, 0) => row / 8 * stride + k / 16 * leading + k % 16 * 8 + row % 8 * 2,
            // Rows are as wide as the swizzle, and wider tiles are blocks of columns.
            (false, width) => swizzled(k / width * rows * width + row / 8 * stride + row % 8 * width + k % width),
            (true, width) => {
                let columns = width / 2;
                swizzled(row / columns * leading + k / 16 * stride + k % 16 / 2 * width + row % columns * 2)
            }
        }
    }

    /// The leading and the stride offset of the descriptor, in bytes.
    fn offsets(self, rows: usize, depth: usize) -> (usize, usize) {
        match (self.transpose, self.swizzle) {
            (false, 0) => (rows / 8 * 128, 128),
            (true, 0) => (rows / 8 * 128, 128),
            (false, width) => (16, 8 * width),
            (true, width) => (depth / 16 * 8 * width, 8 * width),
        }
    }

    /// The bytes from the start of a tile to its step `k` of 32 bytes.
    fn step(self, k: usize, rows: usize, depth: usize) -> usize {
        match (self.transpose, self.swizzle) {
            (_, 0) => 2 * self.offsets(rows, depth).0 * k,
            (false, width) => k * 32 / width * rows * width + k * 32 % width,
            (true, _) => 2 * self.offsets(rows, depth).1 * k,
        }
    }

    fn bytes(self, rows: usize, depth: usize) -> usize {
        let width = self.swizzle;
        let rows = if self.transpose && width > 0 { rows.next_multiple_of(width / 2) } else { rows };
        let depth = if !self.transpose && width > 0 { depth.next_multiple_of(width) } else { depth };
        (rows * depth).next_multiple_of(1024)
    }

    /// The descriptor of a tile at an address.
    fn descriptor(self, address: usize, rows: usize, depth: usize) -> u64 {
        let (leading, stride) = self.offsets(rows, depth);
        let mode = match self.swizzle {
            128 => 1u64,
            64 => 2,
            32 => 3,
            _ => 0,
        };
        (address as u64 >> 4) | (leading as u64 >> 4) << 16 | (stride as u64 >> 4) << 32 | mode << 62
    }
}

/// A product of 64 x `depth` and `depth` x `n` elements.
struct Product {
    n: usize,
    depth: usize,
    element: Element,
    /// `None` if A lies in registers.
    a: Option<Layout>,
    b: Layout,
    negate: (bool, bool),
    /// Whether the product is added to what the accumulators held.
    accumulate: bool,
}

/// Runs a product and compares all of D.
fn check(product: &Product, seed: u64) {
    let Product { n, depth, element, .. } = *product;
    let (size, steps) = (element.bytes(), depth * element.bytes() / 32);
    let mut random = Random(seed);
    let mut value = || element.random(&mut random);
    let a: Vec<Vec<(u16, f32)>> = (0..64).map(|_| (0..depth).map(|_| value()).collect()).collect();
    let b: Vec<Vec<(u16, f32)>> = (0..n).map(|_| (0..depth).map(|_| value()).collect()).collect();
    let mut image = Vec::new();
    let place = |image: &mut Vec<u8>, layout: Layout, matrix: &[Vec<(u16, f32)>]| {
        let start = image.len();
        image.resize(start + layout.bytes(matrix.len(), depth * size), 0);
        for (row, values) in matrix.iter().enumerate() {
            for (k, (bits, _)) in values.iter().enumerate() {
                let at = start + layout.place(row, k * size, matrix.len(), depth * size);
                image[at..at + size].copy_from_slice(&bits.to_le_bytes()[..size]);
            }
        }
        start
    };
    let b_start = place(&mut image, product.b, &b);
    let a_start = product.a.map(|layout| place(&mut image, layout, &a)).unwrap_or(image.len());
    let shared = image.len();
    // If A lies in registers, its fragments follow: by step of k, register and thread.
    if product.a.is_none() {
        for step in 0..steps {
            for register in 0..4 {
                for thread in 0..128 {
                    // A register has 4 bytes of k in every format.
                    let (row, k) = place_in_a(thread, register);
                    let first = (32 * step + 2 * k) / size;
                    let elements = a[row][first..first + 4 / size].iter();
                    image.extend(elements.flat_map(|(bits, _)| bits.to_le_bytes().into_iter().take(size)));
                }
            }
        }
    }
    let accumulators: Vec<String> = (0..n / 2).map(|i| format!("%d{i}")).collect();
    let types = match element {
        Bf16 => "k16.f32.bf16.bf16",
        F16 => "k16.f32.f16.f16",
        E4m3 => "k32.f32.e4m3.e4m3",
    };
    let sign = |negative| if negative { "-1" } else { "1" };
    let mut code = String::new();
    for step in 0..steps {
        let depth = depth * size;
        let b_descriptor = product.b.descriptor(1024 + b_start + product.b.step(step, n, depth), n, depth);
        let a_text = match product.a {
            Some(layout) => {
                let descriptor = layout.descriptor(1024 + a_start + layout.step(step, 64, depth), 64, depth);
                code += &format!("mov.b64 %rd11, {descriptor:#x};\n");
                "%rd11".to_string()
            }
            None => format!("{{%a{}, %a{}, %a{}, %a{}}}", 4 * step, 4 * step + 1, 4 * step + 2, 4 * step + 3),
        };
        let transposes = match product.a {
            _ if element == E4m3 => String::new(),
            Some(layout) => format!(", {}, {}", layout.transpose as u8, product.b.transpose as u8),
            None => format!(", {}", product.b.transpose as u8),
        };
        let scale = if step == 0 && !product.accumulate { "%p2" } else { "%p1" };
        code += &format!(
            "mov.b64 %rd10, {b_descriptor:#x};
             wgmma.mma_async.sync.aligned.m64n{n}{types} {{{}}}, {a_text}, %rd10, {scale}, {}, {}{transposes};\n",
            accumulators.join(", "),
            sign(product.negate.0),
            sign(product.negate.1)
        );
    }
    let load_a: String = match product.a {
        Some(_) => String::new(),
        None => (0..4 * steps).map(|i| format!("ld.global.b32 %a{i}, [%rd5+{}];\n", shared + i * 512)).collect(),
    };
    let initial: String = (0..n / 2).map(|i| format!("mov.f32 %d{i}, 0f{:08X};\n", (i as f32).to_bits())).collect();
    let stores: String = (0..n / 2).map(|i| format!("st.global.f32 [%rd6+{}], %d{i};\n", i * 512)).collect();
    let ptx = format!(
        "{HEADER}.extern .shared .align 1024 .b8 tiles[];
        .visible .entry test(.param .u64 out, .param .u64 in) .maxntid 128 {{
        .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<16>; .reg .f32 %d<128>; .reg .b32 %a<64>;
        ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [in]; mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd5, %r1, 4, %rd2; mad.wide.u32 %rd6, %r1, 4, %rd1;
        mov.u32 %r2, tiles; mul.lo.u32 %r3, %r1, 16; setp.eq.u32 %p1, %r1, %r1; setp.ne.u32 %p2, %r1, %r1;
        COPY: add.u32 %r4, %r2, %r3; cvt.u64.u32 %rd3, %r3; add.s64 %rd3, %rd3, %rd2;
        ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd3]; st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}};
        add.u32 %r3, %r3, 2048; setp.lt.u32 %p3, %r3, {shared}; @%p3 bra COPY;
        fence.proxy.async.shared::cta; bar.sync 0;
        {load_a} {initial}
        wgmma.fence.sync.aligned;
        {code}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        {stores} ret; }}"
    );
    let (out, stats) = launch(&ptx, one_block(128, shared as u32), &image, 128 * n as u64 * 2).unwrap();
    let sign = if product.negate.0 != product.negate.1 { -1.0 } else { 1.0 };
    for register in 0..n / 2 {
        for thread in 0..128 {
            let (row, column) = place_in_d(thread, register);
            let exact: f32 = (0..depth).map(|k| a[row][k].1 * b[column][k].1).sum();
            let expected = sign * exact + if product.accumulate { register as f32 } else { 0.0 };
            let found = f32::from_le_bytes(out[register * 512 + thread * 4..][..4].try_into().unwrap());
            assert_eq!(
                found, expected,
                "n {n}, depth {depth}, {element:?}, A {:?}, B {:?}: row {row}, column {column}, seed {seed}",
                product.a, product.b
            );
        }
    }
    assert_eq!(stats.multiply_adds, 64 * (n * depth) as u64);
}

const K_MAJOR: Layout = Layout { swizzle: 128, transpose: false };
const MN_MAJOR: Layout = Layout { swizzle: 128, transpose: true };

#[test]
fn shapes() {
    for (i, n) in [8, 16, 24, 64, 72, 128, 136, 176, 192, 256].into_iter().enumerate() {
        for element in [Bf16, F16, E4m3] {
            let product = Product {
                n,
                depth: 64,
                element,
                a: Some(K_MAJOR),
                b: K_MAJOR,
                negate: (false, false),
                accumulate: i % 2 == 0,
            };
            check(&product, n as u64);
        }
    }
}

#[test]
fn both_majors_of_both_operands_in_every_swizzle() {
    for swizzle in [0, 32, 64, 128] {
        for (a, b) in [(false, false), (false, true), (true, false), (true, true)] {
            let product = Product {
                n: 64,
                depth: 32,
                element: if swizzle == 64 { F16 } else { Bf16 },
                a: Some(Layout { swizzle, transpose: a }),
                b: Layout { swizzle, transpose: b },
                negate: (false, false),
                accumulate: false,
            };
            check(&product, swizzle as u64);
        }
        for (n, depth) in [(64, 32), (24, 256)] {
            let layout = Layout { swizzle, transpose: false };
            let negate = (false, false);
            check(&Product { n, depth, element: E4m3, a: Some(layout), b: layout, negate, accumulate: true }, n as u64);
        }
    }
}

#[test]
fn a_in_registers() {
    for n in [64, 128, 184] {
        for b in [K_MAJOR, MN_MAJOR] {
            for element in [Bf16, F16] {
                let negate = (false, false);
                check(&Product { n, depth: 80, element, a: None, b, negate, accumulate: true }, n as u64);
            }
        }
        let negate = (true, false);
        check(&Product { n, depth: 160, element: E4m3, a: None, b: K_MAJOR, negate, accumulate: true }, n as u64);
    }
}

#[test]
fn signs() {
    for negate in [(true, false), (false, true), (true, true)] {
        check(&Product { n: 32, depth: 16, element: Bf16, a: Some(K_MAJOR), b: MN_MAJOR, negate, accumulate: true }, 3);
    }
}

#[test]
fn wide_tiles_and_several_blocks_of_columns() {
    // An MN-major B of 256 columns is four blocks of 64, which the leading offset parts. K-major
    // tiles of depth 192 are three blocks of columns.
    check(
        &Product {
            n: 256,
            depth: 48,
            element: Bf16,
            a: Some(MN_MAJOR),
            b: MN_MAJOR,
            negate: (false, false),
            accumulate: false,
        },
        1,
    );
    check(
        &Product {
            n: 160,
            depth: 192,
            element: Bf16,
            a: Some(K_MAJOR),
            b: K_MAJOR,
            negate: (false, false),
            accumulate: false,
        },
        2,
    );
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for (instruction, expected) in [
        ("m64n8k32.f32.e5m2.e5m2 {%f0, %f1, %f2, %f3}, %rd1, %rd1, %p1, 1, 1", "types `f32.e5m2.e5m2` are unknown"),
        ("m64n8k32.f32.e4m3.e5m2 {%f0, %f1, %f2, %f3}, %rd1, %rd1, %p1, 1, 1", "types `f32.e4m3.e5m2` are unknown"),
        ("m64n8k16.f32.e4m3.e4m3 {%f0, %f1, %f2, %f3}, %rd1, %rd1, %p1, 1, 1", "shape `m64n8k16` is unknown: m64nNk32"),
        ("m64n8k32.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd1, %rd1, %p1, 1, 1, 0, 0", "shape `m64n8k32` is unknown"),
        ("m64n8k32.f32.e4m3.e4m3 {%f0, %f1, %f2, %f3}, %rd1, %rd1, %p1, 1, 1, 0, 0", "8 operands instead of 6"),
    ] {
        let text = common::kernel_with("", "", &format!("wgmma.mma_async.sync.aligned.{instruction};"));
        let error = ptx_emulator::Module::parse("test.ptx", &text).expect_err(instruction).to_string();
        assert!(error.contains(expected), "{error}");
    }
}
