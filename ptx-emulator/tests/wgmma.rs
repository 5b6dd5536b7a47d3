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
            (false, 0) => row / 8 * stride + k / 8 * leading + row % 8 * 16 + k % 8 * 2,
            (true, 0) => row / 8 * stride + k / 8 * leading + k % 8 * 16 + row % 8 * 2,
            // Rows are as wide as the swizzle, and wider tiles are blocks of columns.
            (false, width) => {
                let columns = width / 2;
                swizzled(k / columns * rows * width + row / 8 * stride + row % 8 * width + k % columns * 2)
            }
            (true, width) => {
                let columns = width / 2;
                swizzled(row / columns * leading + k / 8 * stride + k % 8 * width + row % columns * 2)
            }
        }
    }

    /// The leading and the stride offset of the descriptor, in bytes.
    fn offsets(self, rows: usize, depth: usize) -> (usize, usize) {
        match (self.transpose, self.swizzle) {
            (false, 0) => (rows / 8 * 128, 128),
            (true, 0) => (rows / 8 * 128, 128),
            (false, width) => (16, 8 * width),
            (true, width) => (depth / 8 * 8 * width, 8 * width),
        }
    }

    /// The bytes from the start of a tile to its step `k` of 16.
    fn step(self, k: usize, rows: usize, depth: usize) -> usize {
        match (self.transpose, self.swizzle) {
            (_, 0) => 2 * self.offsets(rows, depth).0 * k,
            (false, width) => k * 32 / width * rows * width + k * 32 % width,
            (true, _) => 2 * self.offsets(rows, depth).1 * k,
        }
    }

    fn bytes(self, rows: usize, depth: usize) -> usize {
        let columns = self.swizzle / 2;
        let rows = if self.transpose && columns > 0 { rows.next_multiple_of(columns) } else { rows };
        let depth = if !self.transpose && columns > 0 { depth.next_multiple_of(columns) } else { depth };
        (rows * depth * 2).next_multiple_of(1024)
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
    f16: bool,
    /// `None` if A lies in registers.
    a: Option<Layout>,
    b: Layout,
    negate: (bool, bool),
    /// Whether the product is added to what the accumulators held.
    accumulate: bool,
}

/// The bits of a value in f16 or bf16, and the value that they have.
fn half(value: f32, f16: bool) -> (u16, f32) {
    if f16 {
        // This is exact for the multiples of 1/16 below 4, which the tests use.
        let bits = value.to_bits();
        let half = if value == 0.0 {
            0
        } else {
            (bits >> 16 & 0x8000) | ((bits >> 23 & 0xff) - 112) << 10 | bits >> 13 & 0x3ff
        };
        (half as u16, value)
    } else {
        let bits = value.to_bits() & 0xffff_0000;
        ((bits >> 16) as u16, f32::from_bits(bits))
    }
}

/// Runs a product and compares all of D.
fn check(product: &Product, seed: u64) {
    let Product { n, depth, f16, .. } = *product;
    let mut random = Random(seed);
    let mut value = || half((random.unit() * 48.0).trunc() / 16.0, f16);
    let a: Vec<Vec<(u16, f32)>> = (0..64).map(|_| (0..depth).map(|_| value()).collect()).collect();
    let b: Vec<Vec<(u16, f32)>> = (0..n).map(|_| (0..depth).map(|_| value()).collect()).collect();
    let mut image = Vec::new();
    let place = |image: &mut Vec<u8>, layout: Layout, matrix: &[Vec<(u16, f32)>]| {
        let start = image.len();
        image.resize(start + layout.bytes(matrix.len(), depth), 0);
        for (row, values) in matrix.iter().enumerate() {
            for (k, (bits, _)) in values.iter().enumerate() {
                let at = start + layout.place(row, k, matrix.len(), depth);
                image[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            }
        }
        start
    };
    let b_start = place(&mut image, product.b, &b);
    let a_start = product.a.map(|layout| place(&mut image, layout, &a)).unwrap_or(image.len());
    let shared = image.len();
    // If A lies in registers, its fragments follow: by step of k, register and thread.
    if product.a.is_none() {
        for step in 0..depth / 16 {
            for register in 0..4 {
                for thread in 0..128 {
                    let (row, k) = place_in_a(thread, register);
                    image.extend_from_slice(&a[row][16 * step + k].0.to_le_bytes());
                    image.extend_from_slice(&a[row][16 * step + k + 1].0.to_le_bytes());
                }
            }
        }
    }
    let accumulators: Vec<String> = (0..n / 2).map(|i| format!("%d{i}")).collect();
    let types = if f16 { "f32.f16.f16" } else { "f32.bf16.bf16" };
    let sign = |negative| if negative { "-1" } else { "1" };
    let mut code = String::new();
    for step in 0..depth / 16 {
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
            Some(layout) => format!("{}, {}", layout.transpose as u8, product.b.transpose as u8),
            None => format!("{}", product.b.transpose as u8),
        };
        let scale = if step == 0 && !product.accumulate { "%p2" } else { "%p1" };
        code += &format!(
            "mov.b64 %rd10, {b_descriptor:#x};
             wgmma.mma_async.sync.aligned.m64n{n}k16.{types} {{{}}}, {a_text}, %rd10, {scale}, {}, {}, {transposes};\n",
            accumulators.join(", "),
            sign(product.negate.0),
            sign(product.negate.1)
        );
    }
    let load_a: String = match product.a {
        Some(_) => String::new(),
        None => (0..depth / 4).map(|i| format!("ld.global.b32 %a{i}, [%rd5+{}];\n", shared + i * 512)).collect(),
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
            // All terms are multiples of 2^-8 below 2^11, so that the sum is exact in f32 in any
            // order.
            let exact: f32 = (0..depth).map(|k| a[row][k].1 * b[column][k].1).sum();
            let expected = sign * exact + if product.accumulate { register as f32 } else { 0.0 };
            let found = f32::from_le_bytes(out[register * 512 + thread * 4..][..4].try_into().unwrap());
            assert_eq!(
                found, expected,
                "n {n}, depth {depth}, f16 {f16}, A {:?}, B {:?}: row {row}, column {column}, seed {seed}",
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
        for f16 in [false, true] {
            let product = Product {
                n,
                depth: 64,
                f16,
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
                f16: swizzle == 64,
                a: Some(Layout { swizzle, transpose: a }),
                b: Layout { swizzle, transpose: b },
                negate: (false, false),
                accumulate: false,
            };
            check(&product, swizzle as u64);
        }
    }
}

#[test]
fn a_in_registers() {
    for n in [64, 128, 184] {
        for b in [K_MAJOR, MN_MAJOR] {
            for f16 in [false, true] {
                check(&Product { n, depth: 80, f16, a: None, b, negate: (false, false), accumulate: true }, n as u64);
            }
        }
    }
}

#[test]
fn signs() {
    for negate in [(true, false), (false, true), (true, true)] {
        check(&Product { n: 32, depth: 16, f16: false, a: Some(K_MAJOR), b: MN_MAJOR, negate, accumulate: true }, 3);
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
            f16: false,
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
            f16: false,
            a: Some(K_MAJOR),
            b: K_MAJOR,
            negate: (false, false),
            accumulate: false,
        },
        2,
    );
}
