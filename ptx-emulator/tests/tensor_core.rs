//! The arithmetic of `wgmma`, as measured on an H100.

mod common;
#[path = "common/tensor_core.rs"]
mod tensor_core;

use ptx_emulator::Module;
use tensor_core::{COLUMNS, Case, Format, Kept, cases, program};

const FORMATS: [Format; 2] = [Format::Bf16, Format::F16];

fn module() -> Module {
    common::module(&program(&FORMATS))
}

/// One dot product: each term is a product of two equal factors' magnitudes, `sign * 2^exponent`.
fn dot(module: &Module, format: Format, sum: f32, terms: &[(f64, i32)]) -> f32 {
    let factor = |k: usize, other: bool| match terms.get(k) {
        Some((sign, exponent)) if other => sign * 2f64.powi(exponent - exponent / 2),
        Some((_, exponent)) => 2f64.powi(exponent / 2),
        None => 0.0,
    };
    let case = Case::question(format, "one", |_, k| factor(k, true), |_, k| factor(k, false), |_, _| sum as f64);
    let found = case.emulate(module);
    assert!(found.iter().all(|bits| *bits == found[0]), "equal rows and columns differ");
    f32::from_bits(found[0])
}

#[test]
fn terms_are_cut_one_by_one() {
    let module = module();
    for format in FORMATS {
        let dot = |sum, terms: &[(f64, i32)]| dot(&module, format, sum, terms);
        // Sixteen products of 2^-26 beside 1 vanish, together 2^-22; two of 2^-24 count.
        assert_eq!(dot(1.0, &[(1.0, -26); 16]), 1.0);
        assert_eq!(dot(-1.0, &[(-1.0, -26); 16]), -1.0);
        assert_eq!(dot(1.0, &[(1.0, -24); 2]), 1.0 + f32::EPSILON);
        let beside_a_product: Vec<(f64, i32)> = std::iter::once((1.0, 0)).chain([(1.0, -26); 15]).collect();
        assert_eq!(dot(0.0, &beside_a_product), 1.0);
        // The result is cut too: 1 + 3 * 2^-25 is 1.
        assert_eq!(dot(1.0, &[(1.0, -25); 3]), 1.0);
        assert_eq!(dot(1.0, &[(1.0, -25); 4]), 1.0 + f32::EPSILON);
        assert_eq!(dot(0.0, &[(1.0, 22), (-1.0, 22), (1.0, 0)]), 1.0);
        assert_eq!(dot(0.0, &[(1.0, 30), (-1.0, 30), (1.0, 0)]), 0.0);
    }
}

/// Value of an operand's bits.
fn value(format: Format, bits: u32) -> f64 {
    match format {
        Format::Bf16 => half::bf16::from_bits(bits as u16).to_f64(),
        _ => half::f16::from_bits(bits as u16).to_f64(),
    }
}

#[test]
fn sums_differ_from_exact_ones_by_what_is_cut() {
    let module = module();
    for format in FORMATS {
        for case in cases(format).into_iter().filter(|case| case.steps == 1 && case.kept == Kept::Bits) {
            // A subnormal factor has a larger exponent than its value says, and the others lose more beside it.
            if !case.name.contains("random") || case.name.contains("subnormal") {
                continue;
            }
            for (i, found) in case.emulate(&module).into_iter().enumerate() {
                let (a, b, c) = case.operands(i, 0);
                let c = f32::from_bits(c) as f64;
                let products = a.iter().zip(&b).map(|(a, b)| value(format, *a) * value(format, *b));
                let largest = products.clone().fold(c.abs(), |most, product| most.max(product.abs()));
                let exact = products.sum::<f64>() + c;
                let found = f32::from_bits(found) as f64;
                // Seventeen terms lose less than 2^-25 of a power of two that is not above the largest, and the sum less than
                // an ulp; f64 loses far less.
                let bound = 17.0 * largest * 2f64.powi(-25) + exact.abs().max(largest) * 2f64.powi(-23);
                let (row, column) = (i / COLUMNS, i % COLUMNS);
                let finite = exact.abs() < f32::MAX as f64;
                assert!(
                    !finite || (found - exact).abs() <= bound.max(2f64.powi(-149)),
                    "{}, row {row}, column {column}: {found:e} for {exact:e}",
                    case.name
                );
            }
        }
    }
}
