//! `framestride run`: one layer on a video or on tensors of a file, compared with the f64
//! reference.

use std::path::{Path, PathBuf};

use clap::Args;
use framestride::shapes::spec::{NormKind, Spec};
use framestride::{Error, Result};
use framestride_check::layer_run::{self, LayerReport, check_dense_heads};
use framestride_check::rope::RopeTables;
use framestride_check::tensors::Inputs;
use serde_json::json;

use crate::device_options::{DeviceOptions, check_memory};
use crate::outcome::{Outcome, to_json};
use crate::output::Output;
use crate::pictures::RunPictures;
use crate::progress::Bar;
use crate::spec_argument::read_spec;
use crate::tensor_files::{load_frames, load_inputs, save_output};
use crate::video;

/// Runs one profiled sparse layer on a video's patches or on given tensors, and compares it with
/// the f64 reference. Without either, it runs on random tensors with planted spatial and temporal
/// heads.
#[derive(Args)]
pub struct Run {
    /// The spec.
    spec: String,
    #[command(flatten)]
    on: DeviceOptions,
    /// Frames: a safetensors file with `frames`, u8 [frames, height, width, 3].
    #[arg(long, value_name = "FILE", conflicts_with = "qkv")]
    video: Option<PathBuf>,
    /// Tensors: a safetensors file with `q`, `k`, `v` as [B, S, H, D] or [B, H, S, D] in bf16, f16,
    /// f32 or f64. It may have `cos`, `sin`, `text_lengths`, `q_norm.weight` and `q_norm.bias`, and
    /// the same for `k_norm`, `q_norm_text` and `k_norm_text`. Text that is projected apart is
    /// `q_text`, `k_text` and `v_text`, and `q`, `k` and `v` have the other rows. With text on both
    /// sides of the video, `before` and `after` stand in place of `text`. The names and table shapes
    /// of diffusers are understood too: `query`, `encoder_query`, `freqs_cos` [S, D],
    /// `attn.norm_q.weight`, `attn.norm_added_q.weight`. A tensor of any other name is an error.
    #[arg(long, value_name = "FILE")]
    qkv: Option<PathBuf>,
    /// Softmax scale. Without it, 1 / sqrt(head_dim) is taken.
    #[arg(long, value_name = "NUMBER")]
    scale: Option<f32>,
    /// Heads that are dense whatever profiling finds, counted from 0, such as 0,3.
    #[arg(long, value_name = "HEADS", value_delimiter = ',')]
    dense_heads: Vec<u32>,
    /// Valid text tokens of each batch item, such as 77,12, instead of the file's. When neither
    /// says it, all text is valid.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    text_lengths: Option<Vec<u32>>,
    /// The same of the text before the video, where there is text on both sides.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    before_lengths: Option<Vec<u32>>,
    /// The same of the text after the video, where there is text on both sides.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    after_lengths: Option<Vec<u32>>,
    /// Where the output goes. With --qkv, it goes to FILE.out.safetensors beside the tensors when
    /// this is not given. It may be /dev/stdout: the text then goes to standard error.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder for pictures and report.json.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// Name of the output beside a file of tensors.
fn output_beside(tensors: &Path) -> PathBuf {
    let name = tensors.file_name().unwrap_or_default().to_string_lossy();
    tensors.with_file_name(format!("{}.out.safetensors", name.strip_suffix(".safetensors").unwrap_or(&name)))
}

/// Runs a layer.
pub fn run(arguments: Run) -> Result<Outcome> {
    let Run {
        spec: argument,
        on,
        video,
        qkv,
        scale,
        dense_heads,
        text_lengths,
        before_lengths,
        after_lengths,
        out,
        report,
    } = arguments;
    let bar = Bar::new();
    let spec = read_spec(&argument)?;
    // Outputs and inputs come first, so that what is wrong with them is said before anything is
    // built.
    let read: Vec<PathBuf> =
        [&video, &qkv].into_iter().flatten().cloned().chain(on.files()).chain([argument.into()]).collect();
    let read: Vec<&Path> = read.iter().map(PathBuf::as_path).collect();
    let out = out.or_else(|| qkv.as_deref().map(output_beside));
    let heads = video.as_ref().map(|_| spec.heads as usize);
    let report = report.map(|folder| RunPictures::new(&folder, heads, &read)).transpose()?;
    let out = out.map(|out| Output::new(&out, &read)).transpose()?;
    if let (Some(out), Some(report)) = (&out, &report)
        && let Some(other) = report.outputs().find(|other| other.is_same(out))
    {
        return Err(Error::input(
            out.path().display(),
            format!("a file of the report, {}", other.path().display()),
            "an output of its own",
            "Give another name to --out or another folder to --report",
        ));
    }
    let device = on.choose_for(&spec)?;
    bar.say("inputs", None);
    let (mut inputs, frames) = match (&video, &qkv) {
        (Some(path), _) => {
            let frames = load_frames(path)?;
            let source = path.display().to_string();
            (video::inputs(&spec, spec.heads as usize, &frames, &source)?, Some(frames))
        }
        (None, Some(path)) => (load_inputs(path, &spec)?, None),
        (None, None) => {
            check_memory(&spec, &device)?;
            (Inputs::planted(&spec, spec.batch as usize, spec.heads as usize, 0), None)
        }
    };
    inputs.scale = scale;
    give_lengths(&mut inputs, &spec, [("text", text_lengths), ("before", before_lengths), ("after", after_lengths)])?;
    inputs.check(&spec, "inputs")?;
    check_dense_heads(&dense_heads, inputs.q.heads, "--dense-heads")?;
    let module = on.load(&spec, &device, &bar)?;
    let device_name = module.device().name();
    let progress = |what: &str, part| bar.say(&format!("{what} ({device_name})"), part);
    let run = layer_run::run_layer(&module, &inputs, &dense_heads, &progress)?;
    let assumed = if qkv.is_some() { assumed(&spec, &inputs) } else { Vec::new() };
    let mut files = Vec::new();
    let mut write = || -> Result<()> {
        if let Some(out) = &out {
            bar.say("output", None);
            save_output(out, &run.out, Some(&run.lse))?;
            files.push(out.path().to_owned());
        }
        if let Some(report) = &report {
            bar.say("pictures", None);
            files.extend(report.write(&spec, &inputs, &run, frames.as_ref())?);
        }
        Ok(())
    };
    let unwritten = write().err();
    drop(bar);
    let files: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
    let mut json = to_json(&run.report);
    json["files"] = json!(files);
    json["assumed"] = json!(assumed);
    let mut text = run_text(&run.report);
    for line in &assumed {
        text += &format!("assumed: {line}\n");
    }
    for file in &files {
        text += &format!("wrote {file}\n");
    }
    let aside = out.is_some_and(|out| out.is_stdout());
    Ok(Outcome { text, ok: run.report.ok, json, aside, unwritten })
}

/// Takes the valid lengths of text that options give. Which of them a spec has depends on the sides
/// of the video on which it has text.
fn give_lengths(inputs: &mut Inputs, spec: &Spec, given: [(&str, Option<Vec<u32>>); 3]) -> Result<()> {
    let names = Inputs::text_names(&spec.layout);
    let (found, allowed) = match names.contains(&"text") {
        true => ("a spec with text on one side of the video at most", &["text"][..]),
        false => ("a spec with text on both sides of the video", &["before", "after"][..]),
    };
    for (name, lengths) in given {
        let Some(lengths) = lengths else { continue };
        if !allowed.contains(&name) {
            let options: Vec<String> = allowed.iter().map(|name| format!("--{name}-lengths")).collect();
            return Err(Error::input(
                format!("--{name}-lengths"),
                found,
                options.join(", "),
                "Give lengths with these",
            ));
        }
        let text = if names[0] == name { &mut inputs.before } else { &mut inputs.after };
        text.lengths = Some(lengths);
    }
    Ok(())
}

/// What a file of tensors left open, and what was taken instead.
fn assumed(spec: &Spec, inputs: &Inputs) -> Vec<String> {
    let mut assumed = Vec::new();
    let norms = [("q_norm", &inputs.q_norm), ("k_norm", &inputs.k_norm)];
    for (name, norm) in norms.into_iter().filter(|(_, norm)| spec.qk_norm.is_some() && norm.weight.is_none()) {
        assumed.push(format!("{name} has no weights: ones"));
        if norm.bias.is_none() && spec.qk_norm.is_some_and(|norm| norm.kind == NormKind::Layer) {
            assumed.push(format!("{name} has no bias: zeros"));
        }
    }
    if inputs.rope.is_some() && inputs.rope == spec.rope.map(|_| RopeTables::from_grid(spec, inputs.q.heads)) {
        assumed.push("cos and sin: made from the spec's frames and grid".into());
    }
    assumed
}

fn run_text(report: &LayerReport) -> String {
    let [batch, rows, heads, head_dim] = report.shape;
    // Where a bound chose precisions, there are columns of them.
    let precisions = report.heads.iter().any(|head| head.precision_error.is_some());
    let mut text = format!(
        "{} on {}: {batch} x {rows} tokens x {heads} heads x {head_dim}\n\n{:>5} {:>5} {:>14} {:>14} {:>9} {:>8} {:>12} {:>11} {:>10}{}\n",
        report.spec,
        report.device,
        "batch",
        "head",
        "spatial error",
        "temporal error",
        "mask",
        "density",
        "vs reference",
        "tolerance",
        "vs dense",
        if precisions { "  in 8 bits  bits" } else { "" }
    );
    for head in &report.heads {
        text += &format!(
            "{:>5} {:>5} {:>14.4e} {:>14.4e} {:>9} {:>8.4} {:>12.2e} {:>11.2e} {:>10.2e}{}{}\n",
            head.batch,
            head.head,
            head.spatial_error,
            head.temporal_error,
            head.mask,
            head.density,
            head.rel_error,
            head.tolerance,
            head.dense_rel_error,
            head.precision_error.map_or(String::new(), |error| format!(" {error:>10.2e} {:>5}", head.bits)),
            match (&head.reason, head.ok, head.nan_rows) {
                (Some(reason), ..) => format!("  FAILED: {reason}"),
                (None, false, _) => "  FAILED".into(),
                (None, true, 0) => String::new(),
                (None, true, rows) => format!("  {rows} rows are not finite: inputs are not"),
            }
        );
    }
    text += &format!(
        "\nmean density {:.4}; relative error against the f64 reference {:.2e} over {} rows of each head\n\n",
        report.density, report.rel_error, report.compared_rows
    );
    if !report.not_finite.is_empty() {
        text += &format!(
            "of the inputs, {}, and so is what they reach: of V, every row that reads a tile with it\n\n",
            report.not_finite.join(", ")
        );
    }
    for kernel in &report.kernels {
        text += &format!("{:<14} {:>12.3} ms\n", kernel.kernel, kernel.milliseconds);
    }
    text
}
