//! `framestride bench`: how fast the kernels of a spec are on a GPU.

use std::path::{Path, PathBuf};

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use framestride::{Device, Error, Result};
use framestride_check::timing::{self, BenchOptions, Timed};

use crate::device_options::DeviceOptions;
use crate::outcome::{Outcome, to_json};
use crate::output::{Output, print};
use crate::progress::Bar;
use crate::spec_argument::read_spec;
use crate::tensor_files::{load_inputs, save_output};

/// Times the kernels of a spec on a GPU, each by itself and the whole layer, on random inputs.
#[derive(Args)]
pub struct Bench {
    /// The spec.
    spec: String,
    #[command(flatten)]
    on: DeviceOptions,
    /// How many rounds there are. Each times everything once, and medians are shown.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// What is timed.
    #[arg(long, value_enum, num_args = 1.., value_delimiter = ',', default_values_t = Timed::ALL.map(TimedValue))]
    types: Vec<TimedValue>,
    /// TFLOP/s of a large 16-bit matrix product on this GPU. Attention is shown as a share of it.
    #[arg(long, value_name = "TFLOPS")]
    matmul_tflops: Option<f64>,
    /// The mean of the random weights of the QK-norm. Scores grow with its square.
    #[arg(long, value_name = "WEIGHT", default_value_t = 1.0, conflicts_with = "qkv")]
    qk_norm_weight: f64,
    /// Waits for a line on standard input before each round, and answers it with a line. So others
    /// can take turns on the GPU. The result comes when standard input ends.
    #[arg(long, conflicts_with = "rounds")]
    paced: bool,
    /// Tensors instead of random ones: see `run`.
    #[arg(long, value_name = "FILE")]
    qkv: Option<PathBuf>,
    /// Where the output goes, with one of --types.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// [`Timed`] as a value of an option.
#[derive(Clone, Copy)]
struct TimedValue(Timed);

impl ValueEnum for TimedValue {
    fn value_variants<'a>() -> &'a [TimedValue] {
        const ALL: [TimedValue; 4] = [
            TimedValue(Timed::Dense),
            TimedValue(Timed::Spatial),
            TimedValue(Timed::Temporal),
            TimedValue(Timed::Profiled),
        ];
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self.0 {
            Timed::Dense => ("dense", "pack, and attention with every head dense"),
            Timed::Spatial => ("spatial", "pack, and attention with every head spatial"),
            Timed::Temporal => ("temporal", "pack, and attention with every head temporal"),
            Timed::Profiled => ("profiled", "The whole layer with profiled heads; profile, select and the second pack"),
        };
        Some(PossibleValue::new(name).help(help))
    }
}

/// Times kernels.
pub fn bench(arguments: Bench) -> Result<Outcome> {
    let Bench { spec: argument, on, rounds, types, matmul_tflops, qk_norm_weight, paced, qkv, out } = arguments;
    let timed = types.into_iter().map(|TimedValue(timed)| timed).collect();
    let options = BenchOptions { timed, matmul_tflops, qk_norm_weight, ..BenchOptions::default() };
    let bar = Bar::new();
    let spec = read_spec(&argument)?;
    if out.is_some() && options.timed.len() != 1 {
        return Err(Error::input(
            "--out",
            format!("{} --types", options.timed.len()),
            "one, whose output it is",
            "Say which with --types",
        ));
    }
    let read: Vec<PathBuf> = qkv.iter().cloned().chain(on.files()).chain([argument.into()]).collect();
    let read: Vec<&Path> = read.iter().map(PathBuf::as_path).collect();
    let out = out.map(|out| Output::new(&out, &read)).transpose()?;
    let (device, passed_over) = on.choose()?;
    if matches!(device, Device::Emulator(_)) {
        let why = passed_over.map_or(String::new(), |reason| format!(" ({reason})"));
        return Err(Error::input(
            "--device",
            format!("the emulator, whose times say nothing about a GPU's{why}"),
            "a GPU",
            "Run it on a machine with one; `framestride doctor` shows what is found here",
        ));
    }
    bar.say("inputs", None);
    let inputs = qkv.map(|path| load_inputs(&path, &spec)).transpose()?;
    let module = on.load(&spec, &device, &bar)?;
    bar.say("inputs to the device", None);
    let mut bench = timing::Bench::new(&module, inputs.as_ref(), &options)?;
    if paced {
        print("ready\n")?;
        for (round, line) in std::io::stdin().lines().enumerate() {
            line.map_err(|error| Error::file("standard input", error))?;
            bench.round(&|_| {})?;
            print(&format!("round {round}\n"))?;
        }
    } else {
        for round in 0..rounds {
            let part = f64::from(round) / f64::from(rounds);
            bench.round(&|what| bar.say(what, Some(part)))?;
        }
    }
    drop(bar);
    let report = bench.report()?;
    let mut text = bench_text(&report);
    let mut outcome = Outcome::new(String::new(), to_json(&report), true);
    if let Some(out) = out {
        outcome.aside = out.is_stdout();
        outcome.unwritten = save_output(&out, &bench.output()?, None).err();
        if outcome.unwritten.is_none() {
            text += &format!("wrote {}\n", out.path().display());
        }
    }
    Ok(Outcome { text, ..outcome })
}

fn bench_text(report: &timing::BenchReport) -> String {
    let [batch, rows, heads, head_dim] = report.shape;
    let mut text = format!(
        "{} on {}: {batch} x {rows} tokens x {heads} heads x {head_dim}, median of {} rounds\n\n{:<18} {:>11} {:>23} {:>9} {:>9} {:>11} {:>9}\n",
        report.spec,
        report.device,
        report.rounds,
        "",
        "ms",
        "fastest to slowest",
        "TFLOP/s",
        "GB/s",
        "of ceiling",
        "density"
    );
    let show = |value: Option<f64>, digits: usize| value.map_or(String::new(), |value| format!("{value:.digits$}"));
    for row in &report.rows {
        text += &format!(
            "{:<18} {:>11.4} {:>23} {:>9} {:>9} {:>11} {:>9}\n",
            if row.what == "ceiling" { "copy".into() } else { [row.what, row.mask.unwrap_or("")].join(" ") },
            row.ms,
            format!("{:.4} to {:.4}", row.low, row.high),
            show(row.tflops, 1),
            show(row.gbps, 0),
            row.of_ceiling.map_or(String::new(), |share| format!("{:.1}%", 100.0 * share)),
            show(row.density, 4),
        );
    }
    let timing::LoadingSeconds { fill, load, compile } = report.loading;
    let how = if compile > 0.0 { format!("which compiled for {compile:.3} s") } else { "from its cache".into() };
    text += &format!("\nloaded in {:.3} s: template {fill:.3} s, driver {load:.3} s ({how})\n", fill + load);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let memory = &report.memory;
    text += "\nTFLOP/s count visible pairs; GB/s count each byte that must be moved once. The ceiling of attention is --matmul-tflops, of the rest the copy.\n";
    if let Some((bytes, tensors)) = memory.beyond_bytes.zip(memory.beyond_tensors) {
        text += &format!(
            "memory beyond Q, K, V and the output: {:.1} MiB, {tensors:.2} times Q (workspace {:.1} MiB)\n",
            mib(bytes),
            mib(memory.workspace_bytes)
        );
    }
    text
}
