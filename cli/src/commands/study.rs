//! `framestride study`: what masks would cost each layer and head, on captured tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use framestride::shapes::density::{half_width_of_density, least_density};
use framestride::shapes::layout::HeadType;
use framestride::shapes::spec::{Compute, Spec};
use framestride::{Error, HeadTypes, Module, Result, SparseAttention, Stream, Workspace};
use framestride_check::device_tensors::{Arrangement, DeviceLayer, Placement};
use framestride_check::tensors::{Inputs, Tokens};
use framestride_study::{Layer, Model, Step, by_head, by_layer, picture};
use serde_json::json;

use crate::device_options::DeviceOptions;
use crate::outcome::{Outcome, to_json};
use crate::output::{Output, make_folder};
use crate::progress::Bar;
use crate::spec_argument::read_spec;
use crate::tensor_files::load_inputs;

/// A model has no more layers.
const MOST_LAYERS: usize = 1000;

/// Finds what masks and 8 bits would cost each layer and head of a model, on captured Q, K and V:
/// the relative error at several densities, and a schedule of densities for an error of your
/// choice.
///
/// The relative error of a head is the root of the mean squared error over its sampled rows, as
/// part of the root mean square of its dense output. That of a layer is the same over all its
/// heads, each with its better mask.
#[derive(Args)]
pub struct Study {
    /// The spec.
    spec: String,
    /// Tensors as `run --qkv` takes them, one file for each layer, or for each step and layer.
    /// Names have `layer` and its number, as in `layer_07.safetensors` or
    /// `step_10_layer_07.safetensors`. Without it the files are layers 0, 1 and so on. A step or a
    /// layer is in no file if it was not captured.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    on: DeviceOptions,
    /// The densities to try.
    #[arg(long, value_name = "DENSITIES", value_delimiter = ',', default_value = "0.1,0.15,0.25,0.35,0.5")]
    densities: Vec<f64>,
    /// The relative error that a layer may have, above 0 and below 1.
    #[arg(long, value_name = "NUMBER", default_value_t = 0.05)]
    error: f64,
    /// What is tried: dtype, the type of the tensors, or e4m3, 8 bits beside it. The schedule then
    /// has 8 bits where that takes less time, but for heads that must stay in 16. Without it, it is
    /// the spec's.
    #[arg(long, value_name = "COMPUTE", value_parser = computes())]
    compute: Option<Compute>,
    /// How many steps the denoising has. Names with steps need it.
    #[arg(long, value_name = "STEPS")]
    steps: Option<u32>,
    /// The noise of each step that files have, from 1 to 0, such as 1,0.83.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    noise: Vec<f64>,
    /// The class of the model, which the schedule names. Without it, it is the name of the spec.
    #[arg(long, value_name = "CLASS")]
    model: Option<String>,
    /// How many layers the model has. Those in no file stay dense. Without it, the last layer is
    /// the last one of the files.
    #[arg(long, value_name = "LAYERS")]
    layers: Option<usize>,
    /// Softmax scale. Without it, 1 / sqrt(head_dim) is taken.
    #[arg(long, value_name = "NUMBER")]
    scale: Option<f32>,
    /// Print the errors of each head instead of those of each layer.
    #[arg(long)]
    by_head: bool,
    /// Where the schedule goes, a JSON file that framestride.diffusers.apply of Python takes.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder for study.json and study.png.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// Studies layers.
pub fn study(arguments: Study) -> Result<Outcome> {
    let bar = Bar::new();
    let spec = read_spec(&arguments.spec)?;
    let tries_8_bits = arguments.compute.unwrap_or(spec.compute) == Compute::E4m3;
    let in_8_bits = tries_8_bits.then(|| of_compute(&spec, Compute::E4m3)).transpose()?;
    if let Some(ptx) = arguments.on.files().next().filter(|_| tries_8_bits) {
        return Err(Error::input(
            "--ptx",
            format!("{}, and 8 bits to be tried", ptx.display()),
            "kernels of one spec",
            "Leave it out, since 8 and 16 bits have kernels of their own, or say --compute dtype",
        ));
    }
    let places = places(&arguments.files)?;
    let mut study = empty(&arguments, &spec, &places)?;
    // Outputs come first, so that what is wrong with them is said before the work.
    let read: Vec<PathBuf> = arguments.files.iter().cloned().chain(arguments.on.files()).collect();
    let read: Vec<&Path> = read.iter().map(PathBuf::as_path).chain([Path::new(&arguments.spec)]).collect();
    let out = arguments.out.as_ref().map(|out| Output::new(out, &read)).transpose()?;
    let report = arguments.report.as_ref().map(|folder| {
        make_folder(folder)?;
        Ok::<_, Error>(["study.json", "study.png"].map(|name| Output::new(&folder.join(name), &read)))
    });
    let report: Option<Vec<Output>> = report.transpose()?.map(|files| files.into_iter().collect()).transpose()?;
    if let (Some(out), Some(report)) = (&out, &report)
        && let Some(other) = report.iter().find(|other| other.is_same(out))
    {
        return Err(Error::input(
            out.path().display(),
            format!("a file of the report, {}", other.path().display()),
            "an output of its own",
            "Give another name to --out or another folder to --report",
        ));
    }
    let device = arguments.on.choose_for(&spec)?;
    let in_16_bits = arguments.on.load(&of_compute(&spec, Compute::Dtype)?, &device, &bar)?;
    let in_8_bits = in_8_bits.map(|spec| arguments.on.load(&spec, &device, &bar)).transpose()?;
    for (number, (&(step, layer), &file)) in places.iter().enumerate() {
        bar.say(&format!("{}", file.display()), Some(number as f64 / places.len() as f64));
        let mut inputs = load_inputs(file, &spec)?;
        inputs.scale = arguments.scale;
        inputs.check(&spec, &file.display().to_string())?;
        let found = study_layer(&in_16_bits, in_8_bits.as_ref(), &inputs, &study.densities)?;
        if let Some(of_step) = study.steps.iter_mut().find(|found| found.index == step) {
            of_step.layers[layer] = Some(found);
        }
    }
    let mut files = Vec::new();
    let mut write = || -> Result<()> {
        if let Some(out) = &out {
            out.write(study.schedule().to_json().as_bytes())?;
            files.push(out.path().display().to_string());
        }
        if let Some([json, png]) = report.as_deref() {
            json.write(study.to_json().as_bytes())?;
            png.write_picture(&picture(&study))?;
            files.extend([json, png].map(|file| file.path().display().to_string()));
        }
        Ok(())
    };
    let unwritten = write().err();
    drop(bar);
    let mut text = format!("{} on {}\n", spec.name, device.name());
    text += &if arguments.by_head { by_head(&study) } else { by_layer(&study) };
    let missing: usize =
        study.steps.iter().map(|step| step.layers.iter().filter(|layer| layer.is_none()).count()).sum();
    if missing > 0 {
        text += &format!("\n{missing} layers of steps are in no file\n");
    }
    for file in &files {
        text += &format!("wrote {file}\n");
    }
    let json = json!({
        "device": device.name(), "study": to_json(&study), "schedule": to_json(&study.schedule()), "files": files,
    });
    let aside = out.is_some_and(|out| out.is_stdout());
    Ok(Outcome { text, ok: true, json, aside, unwritten })
}

/// A study without numbers, whose options were checked.
fn empty(arguments: &Study, spec: &Spec, places: &BTreeMap<(u32, usize), &Path>) -> Result<framestride_study::Study> {
    let layers = places.keys().map(|&(_, layer)| layer + 1).max().unwrap_or(0);
    let most = arguments.layers.unwrap_or(0).max(layers);
    if most > MOST_LAYERS {
        return Err(Error::input(
            "layers",
            most,
            format!("{MOST_LAYERS} at most"),
            "Look at the numbers behind `layer` in the files' names, and at --layers",
        ));
    }
    if let Some(given) = arguments.layers.filter(|&given| given < layers) {
        return Err(Error::input(
            "--layers",
            format!("{given}, and a file of layer {}", layers - 1),
            format!("{layers} or more"),
            "Give the number of layers of the model, which count from 0",
        ));
    }
    let layers = arguments.layers.unwrap_or(layers);
    let mut indices: Vec<u32> = places.keys().map(|&(step, _)| step).collect();
    indices.dedup();
    let last = indices.last().copied().unwrap_or(0);
    let count = match arguments.steps {
        Some(count) if count > last => count,
        None if last == 0 => 1,
        given => {
            return Err(Error::input(
                "--steps",
                given.map_or("none".into(), |given| format!("{given}")) + &format!(", and a file of step {last}"),
                format!("{} or more", last + 1),
                "Give the number of steps of the denoising, which count from 0",
            ));
        }
    };
    let noise = &arguments.noise;
    let falls = noise.is_sorted_by(|a, b| a > b) && noise.iter().all(|noise| (0.0..=1.0).contains(noise));
    if !noise.is_empty() && (noise.len() != indices.len() || !falls) {
        return Err(Error::input(
            "--noise",
            format!("{noise:?}"),
            format!(
                "{} numbers from 1 to 0, one for each step of the files, each less than the one before",
                indices.len()
            ),
            "Leave it out where the noise is not known",
        ));
    }
    let mut densities = arguments.densities.clone();
    densities.sort_by(f64::total_cmp);
    densities.dedup();
    if let Some(density) = densities.iter().find(|&&density| !(density > 0.0 && density <= 1.0)) {
        return Err(Error::input(
            "--densities",
            density,
            "parts of all pairs, above 0 and at most 1",
            "Leave it out for 0.1,0.15,0.25,0.35,0.5",
        ));
    }
    let video = &spec.layout;
    let [height, width] = spec.grid.unwrap_or([1, video.tokens_per_frame.value]);
    let steps = indices.iter().enumerate().map(|(at, &index)| Step {
        index,
        count,
        noise: noise.get(at).copied(),
        layers: vec![None; layers],
    });
    let study = framestride_study::Study {
        version: framestride_study::VERSION,
        models: vec![Model { name: arguments.model.clone().unwrap_or_else(|| spec.name.clone()), layers }],
        video: [video.frames.value, height, width],
        sampled_rows: spec.profile.rows,
        densities,
        error: arguments.error,
        steps: steps.collect(),
    };
    study.allowing(arguments.error)
}

/// The file of each step and layer, by its name, or by its place where no name has a layer.
fn places(files: &[PathBuf]) -> Result<BTreeMap<(u32, usize), &Path>> {
    let stem = |file: &Path| file.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let named: Vec<[Option<u32>; 2]> =
        files.iter().map(|file| ["step", "layer"].map(|word| number_after(&stem(file), word))).collect();
    let has = [0, 1].map(|part| named.iter().any(|named| named[part].is_some()));
    let mut places = BTreeMap::new();
    for (number, (file, &[step, layer])) in files.iter().zip(&named).enumerate() {
        let lacks = [(has[0], step, "step"), (has[1] || has[0], layer, "layer")];
        if let Some((_, _, word)) = lacks.iter().find(|(needed, found, _)| *needed && found.is_none()) {
            return Err(Error::input(
                file.display(),
                format!("a name without {word} and its number"),
                "names like those of the other files: step_10_layer_07.safetensors, or layer_07.safetensors",
                "Rename the files",
            ));
        }
        let place = (step.unwrap_or(0), layer.map_or(number, |layer| layer as usize));
        if let Some(other) = places.insert(place, file.as_path()) {
            return Err(Error::input(
                file.display(),
                format!("layer {} of step {}, as {} is", place.1, place.0, other.display()),
                "one file for each step and layer",
                "Leave one of them out",
            ));
        }
    }
    Ok(places)
}

/// The number that follows a word, at once or behind `_`, `-`, `.` or a space.
fn number_after(text: &str, word: &str) -> Option<u32> {
    text.match_indices(word).find_map(|(at, _)| {
        let rest = text[at + word.len()..].trim_start_matches(['_', '-', '.', ' ']);
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        rest[..digits].parse().ok()
    })
}

/// The values that `--compute` takes.
fn computes() -> impl TypedValueParser<Value = Compute> {
    let named = |name: String| Compute::ALL.into_iter().find(|compute| compute.as_str() == name);
    PossibleValuesParser::new(Compute::ALL.map(Compute::as_str)).try_map(move |name| named(name).ok_or("no compute"))
}

/// The spec with all heads in 16 bits, or all in 8.
fn of_compute(spec: &Spec, compute: Compute) -> Result<Spec> {
    Ok(spec.to_builder().compute(compute).largest_error(None).build()?)
}

/// Runs one layer dense and profiles it at each density, in 16 bits. Where there are kernels in 8
/// bits, it runs in them as well, dense and with the heads' better masks.
fn study_layer(
    in_16_bits: &Arc<Module>,
    in_8_bits: Option<&Arc<Module>>,
    inputs: &Inputs,
    densities: &[f64],
) -> Result<Layer> {
    let (spec, device) = (in_16_bits.spec(), in_16_bits.device());
    let [batch, _, heads, _] = inputs.q.shape();
    let planned = |module: &Arc<Module>| {
        let attention = SparseAttention::new(module, batch as u32, heads as u32)?;
        let workspace = Workspace::allocate(device, attention.workspace_bytes())?;
        Ok::<_, Error>((attention, workspace))
    };
    let in_16_bits = planned(in_16_bits)?;
    let (attention, workspace) = &in_16_bits;
    let in_8_bits = in_8_bits.map(planned).transpose()?;
    let text = [&inputs.before, &inputs.after].map(|text| text.is_apart.then_some(Arrangement::TokensFirst));
    let placement = Placement { text, ..Placement::all(Arrangement::TokensFirst) };
    let placed = DeviceLayer::upload(device, &spec.layout, inputs, placement)?;
    let run = |(attention, workspace): &(SparseAttention, Workspace), layer: &_, types| {
        // SAFETY: all memory is this function's, sized by the library, and outlives the work, which
        // reading the output waits for.
        unsafe { attention.forward(Stream::DEFAULT, layer, types, workspace)? };
        Ok::<_, Error>(placed.out.download(device)?.0)
    };
    let dense = run(&in_16_bits, &placed.layer, HeadTypes::Dense)?;
    let size = mean_squares(spec, &dense, None);
    let (mut errors, mut errors_in_8_bits) = (Vec::new(), Vec::new());
    for &density in densities {
        // Text and sinks alone may take more than a density. Then no error is known.
        let can = HeadType::CANDIDATES.iter().all(|&mask| density >= least_density(&spec.layout, mask));
        let mut means = vec![[if can { 0.0 } else { f64::NAN }; HeadType::CANDIDATES.len()]; heads];
        let mut squares = vec![None; heads];
        if can {
            let half_widths = HeadType::CANDIDATES.map(|mask| half_width_of_density(&spec.layout, mask, density));
            let layer = framestride::Layer { half_widths: Some(half_widths), ..placed.layer };
            // SAFETY: as above. Reading what was found waits for the work.
            unsafe { attention.profile(Stream::DEFAULT, &layer, workspace)? };
            for profile in attention.read_profile(workspace)? {
                for (mean, error) in means[profile.head as usize].iter_mut().zip(profile.errors) {
                    *mean += f64::from(error) / batch as f64;
                }
            }
            if let Some(in_8_bits) = &in_8_bits {
                let found = workspace.address() + attention.workspace_layout().head_types.start;
                squares = mean_squares(spec, &run(in_8_bits, &layer, HeadTypes::Given(found))?, Some(&dense));
            }
        }
        errors.push(means.into_iter().map(|means| means.map(finite)).collect());
        errors_in_8_bits.push(squares);
    }
    let eight_bits = in_8_bits.as_ref().map(|in_8_bits| {
        let out = run(in_8_bits, &placed.layer, HeadTypes::Dense)?;
        errors_in_8_bits.push(mean_squares(spec, &out, Some(&dense)));
        Ok::<_, Error>(errors_in_8_bits)
    });
    Ok(Layer { size, errors, eight_bits: eight_bits.transpose()? })
}

/// The mean square of each head's output over the rows of the video, or of its difference to
/// another one.
fn mean_squares(spec: &Spec, out: &Tokens, other: Option<&Tokens>) -> Vec<Option<f64>> {
    let (first, rows) = (spec.layout.before as usize, spec.layout.video_tokens() as usize);
    let video = first * out.head_dim..(first + rows) * out.head_dim;
    let mean = |head: usize| {
        let squares = |item| {
            let mut values = out.head(item, head)[video.clone()].to_vec();
            if let Some(other) = other {
                values
                    .iter_mut()
                    .zip(&other.head(item, head)[video.clone()])
                    .for_each(|(value, other)| *value -= other);
            }
            values.iter().map(|value| value * value).sum::<f64>()
        };
        finite((0..out.batch).map(squares).sum::<f64>() / (out.batch * video.len()) as f64)
    };
    (0..out.heads).map(mean).collect()
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}
