//! What a bench counts and computes, in the emulator. Its times mean nothing there, and everything
//! else does.

use framestride::shapes::layout::HeadType;
use framestride::{Device, Module, Spec};
use framestride_check::layer_run;
use framestride_check::tensors::Inputs;
use framestride_check::timing::{Bench, BenchOptions, Timed};

const COPY: u64 = 1 << 16;

#[test]
fn rows_count_the_work_of_their_kernels() {
    let module = Module::load(&Device::emulator(), &Spec::shipped("tiny_text_last").unwrap()).unwrap();
    let spec = module.spec();
    let mut bench = Bench::new(&module, None, &BenchOptions { copy_bytes: COPY, ..BenchOptions::default() }).unwrap();
    for _ in 0..3 {
        bench.round(&|_| {}).unwrap();
    }
    let report = bench.report().unwrap();
    let found: Vec<_> = report.rows.iter().map(|row| (row.what, row.mask)).collect();
    let (spatial, temporal) = (Some("spatial"), Some("temporal"));
    let expected = [
        ("ceiling", None),
        ("pack", None),
        ("dense", None),
        ("sparse", spatial),
        ("pack", temporal),
        ("sparse", temporal),
        ("profile", None),
        ("select", None),
        ("repack", None),
        ("layer", None),
    ];
    assert_eq!(found, expected);
    assert_eq!(report.rounds, 3);
    let near = |found: f64, expected: f64| (found / expected - 1.0).abs() < 1e-9;
    let [batch, sequence, heads, head_dim] = report.shape.map(|extent| extent as f64);
    for row in &report.rows {
        assert!(0.0 < row.low && row.low <= row.ms && row.ms <= row.high, "{row:?}");
        let mask = HeadType::ALL.into_iter().find(|&head| row.mask.unwrap_or("dense") == head.name()).unwrap();
        let flop = batch * heads * spec.density(mask) * sequence * sequence * 4.0 * head_dim;
        match row.what {
            "dense" | "sparse" => assert!(near(row.tflops.unwrap() * row.ms * 1e9, flop), "{row:?} {flop}"),
            "layer" => assert!(row.density.unwrap() < 1.0 && row.tflops.is_some()),
            _ => assert_eq!(row.tflops, None),
        }
        let bytes = row.gbps.unwrap() * row.ms * 1e6;
        let tensors = bytes / (batch * sequence * heads * head_dim * 2.0);
        match row.what {
            "dense" | "sparse" => assert!(near(tensors, 4.0), "{row:?}"),
            "ceiling" => assert!(near(bytes, 2.0 * COPY as f64), "{row:?}"),
            "pack" => assert!((6.0..8.0).contains(&tensors), "{row:?}"),
            _ => assert!(bytes > 0.0, "{row:?}"),
        }
    }
}

#[test]
fn given_inputs_have_the_output_of_a_run() {
    let module = Module::load(&Device::emulator(), &Spec::shipped("tiny_text_last").unwrap()).unwrap();
    let spec = module.spec();
    let inputs = Inputs::random(spec, spec.batch as usize, spec.heads as usize, 11);
    let timed = vec![Timed::Profiled];
    let mut bench =
        Bench::new(&module, Some(&inputs), &BenchOptions { timed, copy_bytes: COPY, ..BenchOptions::default() })
            .unwrap();
    bench.round(&|_| {}).unwrap();
    assert!(bench.output().unwrap() == layer_run::run_layer(&module, &inputs, &[], &|_, _| {}).unwrap().out);
}

#[test]
fn weights_are_of_a_norm_that_there_is() {
    for (spec, qk_norm_weight, expected) in [
        ("tiny_plain", 3.0, Some("no [qk_norm]")),
        ("tiny_plain", 1.0, None),
        ("tiny_text_last", f64::NAN, Some("0 to 1000")),
        ("tiny_text_last", -1.0, Some("0 to 1000")),
        ("tiny_text_last", 3.0, None),
    ] {
        let module = Module::load(&Device::emulator(), &Spec::shipped(spec).unwrap()).unwrap();
        let options = BenchOptions { qk_norm_weight, copy_bytes: COPY, ..BenchOptions::default() };
        let error = Bench::new(&module, None, &options).err().map(|error| error.to_string());
        let as_expected = match (&error, expected) {
            (Some(error), Some(words)) => error.contains(words) && error.contains("qk_norm_weight"),
            (None, None) => true,
            _ => false,
        };
        assert!(as_expected, "{spec}, {qk_norm_weight}: {error:?}");
    }
}
