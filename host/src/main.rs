//! The `framestride` command. Exit codes: 0 done, 1 a check failed or a kernel faulted, 2 bad input.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use framestride::attention::profile_splits;
use framestride::bench::{self, Bench, Options, Timed};
use framestride::device::{DeviceChoice, Gpu, cuda_version};
use framestride::files::{load_frames, load_inputs, save_output};
use framestride::inputs::{Inputs, RopeTables};
use framestride::masks;
use framestride::output::{Output, unless_closed, write_stdout};
use framestride::run::{RunReport, check_dense_heads};
use framestride::shapes::arch::Arch;
use framestride::shapes::gain::{Gain, MULTIPROCESSORS, Obstacle};
use framestride::shapes::layout::{HeadType, Layout, TextPosition};
use framestride::shapes::spec::{NormKind, Spec, read_file};
use framestride::shapes::text::{MESSAGE_BYTES, nearest, plain};
use framestride::verify::{Effort, Report};
use framestride::{Device, Error, Kernels, Module, Result, name_of, report, verify, video};
use framestride_builder::toolchain;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

/// Sparse attention for video diffusion transformers, on kernels made for the model's shape.
///
/// SPEC is the name of a shipped spec, such as `demo`, or a TOML file (`./demo` for one of that name). Exit codes: 0 done, 1 a
/// check failed, 2 bad input.
#[derive(Parser)]
#[command(version, name = "framestride")]
struct Cli {
    /// Print one JSON value instead of text.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sequence, tiles, half widths, exact densities, workspace and arithmetic of a spec, and what it can be expected to gain over
    /// dense attention on an H200.
    Describe {
        /// The spec.
        spec: String,
    },
    /// Builds the kernels of a spec: NAME.ptx and its manifest NAME.json.
    Build {
        /// The spec.
        spec: String,
        /// The GPU architecture.
        #[arg(long, default_value = Arch::SM_90A.name)]
        arch: String,
        /// Folder for the two files.
        #[arg(long, default_value = ".")]
        out: PathBuf,
    },
    /// Compares each kernel with the f64 reference, on fresh random inputs, and a profiled layer with itself: run again, it must give
    /// the same bytes. On a GPU so must a CUDA graph of it, replayed up to 1000 times with inputs that change in between, and two
    /// layers on two streams at a time; of large layers, as many as fit some seconds. The emulator has neither graphs nor streams.
    Verify {
        /// The spec.
        spec: String,
        #[command(flatten)]
        on: On,
        /// Seed of the inputs; from the clock when not given.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Runs one profiled sparse layer on a video's patches or on given tensors, and compares it with the f64 reference. Without
    /// either, on random tensors with planted spatial and temporal heads.
    Run(Run),
    /// Times the kernels of a spec on a GPU, each by itself and the whole layer, on random inputs.
    Bench {
        /// The spec.
        spec: String,
        #[command(flatten)]
        on: On,
        /// Rounds, of which each times everything once; medians are shown.
        #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
        rounds: u32,
        /// What is timed.
        #[arg(long, value_enum, num_args = 1.., value_delimiter = ',', default_values_t = Timed::ALL)]
        types: Vec<Timed>,
        /// TFLOP/s of a large 16-bit matrix product on this GPU, to show shares of.
        #[arg(long, value_name = "TFLOPS")]
        matmul_tflops: Option<f64>,
        /// What the random weights of the QK-norm lie around: scores grow with its square.
        #[arg(long, value_name = "WEIGHT", default_value_t = 1.0, conflicts_with = "qkv")]
        qk_norm_weight: f64,
        /// Waits for a line on standard input before each round and answers it with a line, so that others can take turns on the
        /// GPU; the result comes when standard input ends.
        #[arg(long, conflicts_with = "rounds")]
        paced: bool,
        /// Tensors instead of random ones: see `run`.
        #[arg(long, value_name = "FILE")]
        qkv: Option<PathBuf>,
        /// Where the output goes, with one of --types.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Draws the masks of a spec in model order and in packed order.
    Plot {
        /// The spec.
        spec: String,
        /// The PNG file.
        #[arg(long)]
        out: PathBuf,
    },
    /// Shows what was found on this machine and what is missing: device compiler, tools, GPU.
    Doctor,
}

#[derive(Args)]
struct Run {
    /// The spec.
    spec: String,
    #[command(flatten)]
    on: On,
    /// Frames: a safetensors file with `frames`, u8 [frames, height, width, 3].
    #[arg(long, value_name = "FILE", conflicts_with = "qkv")]
    video: Option<PathBuf>,
    /// Tensors: a safetensors file with `q`, `k`, `v` as [B, S, H, D] or [B, H, S, D] in bf16, f16, f32 or f64; optionally
    /// `cos`, `sin`, `q_norm.weight`, `q_norm.bias`, the same for `k_norm`, `q_norm_text` and `k_norm_text`, and
    /// `text_lengths`. The names and table shapes of diffusers are understood too: `query`, `freqs_cos` [S, D],
    /// `attn.norm_q.weight`, `attn.norm_added_q.weight`. A tensor of any other name is an error.
    #[arg(long, value_name = "FILE")]
    qkv: Option<PathBuf>,
    /// Softmax scale; 1 / sqrt(head_dim) when not given.
    #[arg(long, value_name = "NUMBER")]
    scale: Option<f32>,
    /// Heads that are dense whatever profiling finds, from 0, such as 0,3.
    #[arg(long, value_name = "HEADS", value_delimiter = ',')]
    dense_heads: Vec<u32>,
    /// Valid text tokens of each batch item, such as 77,12, instead of the file's; all when neither says it.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    text_lengths: Option<Vec<u32>>,
    /// Where the output goes; with --qkv, FILE.out.safetensors beside it when not given. /dev/stdout is one: the text then
    /// goes to standard error.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder for pictures and report.json.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

#[derive(Args)]
struct On {
    /// Where the kernels run.
    #[arg(long, value_enum, default_value_t)]
    device: DeviceChoice,
    /// Kernels built before: NAME.ptx with NAME.json beside it.
    #[arg(long, value_name = "FILE")]
    ptx: Option<PathBuf>,
}

/// What a command found: text for people, a value for machines, and whether its checks passed.
struct Outcome {
    text: String,
    json: Value,
    ok: bool,
    /// Standard output holds an output: the rest goes to standard error.
    aside: bool,
    /// What was found could not be written.
    unwritten: Option<Error>,
}

impl Outcome {
    fn new(text: String, json: Value, ok: bool) -> Outcome {
        Outcome { text, json, ok, aside: false, unwritten: None }
    }
}

/// Exit code of a check that failed, or a kernel that faulted.
const FAILED: u8 = 1;

/// Exit code of everything that is about what the command was given.
const BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) if usage.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => usage.exit(),
        Err(usage) if usage.use_stderr() => {
            eprintln!("{}", plain(usage.render().to_string().trim_end(), MESSAGE_BYTES));
            return ExitCode::from(BAD_INPUT);
        }
        // Its own way to write help has colours.
        Err(help) => {
            let written = unless_closed(help.print()).map_err(|error| Error::file("standard output", error));
            return written.and_then(|()| print("")).map_or_else(fail, |()| ExitCode::SUCCESS);
        }
    };
    let outcome = match cli.command {
        Command::Describe { spec } => describe(&spec),
        Command::Build { spec, arch, out } => build(&spec, &arch, &out),
        Command::Verify { spec, on, seed } => verify_spec(&spec, &on, seed),
        Command::Run(run) => run_spec(run),
        Command::Bench { spec, on, rounds, types, matmul_tflops, qk_norm_weight, paced, qkv, out } => {
            let rounds = if paced { Rounds::Paced } else { Rounds::Count(rounds) };
            let options = Options { timed: types, matmul_tflops, qk_norm_weight, ..Options::default() };
            bench_spec(&spec, &on, rounds, options, qkv, out)
        }
        Command::Plot { spec, out } => plot(&spec, &out),
        Command::Doctor => Ok(doctor()),
    };
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            if cli.json {
                let text = format!("{:#}\n", json!({ "ok": false, "error": error.to_string() }));
                if let Err(error) = print(&text) {
                    return fail(error);
                }
            }
            return fail(error);
        }
    };
    let text = if cli.json { format!("{:#}\n", outcome.json) } else { outcome.text };
    if outcome.aside {
        eprint!("{text}");
    } else if let Err(error) = print(&text) {
        return fail(error);
    }
    match outcome.unwritten {
        Some(error) => fail(error),
        None => ExitCode::from(if outcome.ok { 0 } else { FAILED }),
    }
}

/// Says an error and gives its exit code.
fn fail(error: Error) -> ExitCode {
    // A kernel that faults has failed its check.
    let failed = matches!(error, Error::Emulator(_) | Error::Driver { .. });
    let text = error.to_string();
    let prefix = if text.starts_with("error") { "" } else { "error: " };
    eprintln!("{prefix}{}", text.trim_end());
    ExitCode::from(if failed { FAILED } else { BAD_INPUT })
}

fn print(text: &str) -> Result<()> {
    write_stdout(text.as_bytes()).map_err(|error| Error::file("standard output", error))
}

/// Name for messages and text of a spec: a shipped one, else a file.
fn spec_text(argument: &str) -> Result<(String, String)> {
    let models = framestride::shapes::models();
    if let Some((name, text)) = models.iter().find(|(name, _)| *name == argument) {
        return Ok((format!("{name} (shipped)"), (*text).to_owned()));
    }
    let text = read_file(Path::new(argument)).map_err(|error| {
        if Path::new(argument).exists() {
            return Error::from(error);
        }
        let names: Vec<&str> = models.iter().map(|(name, _)| *name).collect();
        let mend = nearest(argument, names.iter().copied()).map(|name| format!("Did you mean {name}?"));
        Error::input(
            format!("spec {argument}"),
            "no file, and no shipped spec of this name",
            format!("a TOML file, or one of {}", names.join(", ")),
            mend.unwrap_or("Check the path".into()),
        )
    })?;
    Ok((argument.to_owned(), text))
}

/// The device for a spec. Why it is not the GPU that `auto` would take goes to standard error.
fn choose(spec: &Spec, on: &On) -> Result<Device> {
    let (device, passed_over) = Device::choose(on.device)?;
    if let Some(reason) = passed_over {
        check_emulation(spec, &reason)?;
        eprintln!("note: on the emulator. {reason}");
    }
    Ok(device)
}

/// Whether the emulator can have a layer of the spec's own batch and heads: Q, K and V on the host, they and the output and one more
/// copy of it in its memory, and the workspace.
fn check_memory(spec: &Spec, device: &Device) -> Result<()> {
    let rows = u64::from(spec.batch) * u64::from(spec.heads) * u64::from(spec.layout.sequence());
    let tensor = rows * u64::from(spec.head_dim) * 2;
    let splits = profile_splits(spec, spec.batch, spec.heads, device.multiprocessors());
    device.check_room(8 * tensor + spec.workspace(spec.batch, spec.heads, splits).bytes)
}

/// The kernels of a spec, whose text is in `file`, on a device.
fn load(file: &str, text: &str, device: &Device, on: &On, bar: &Bar) -> Result<std::sync::Arc<Module>> {
    bar.say("kernels", None);
    let kernels = match &on.ptx {
        None => Kernels::for_spec(file, text)?,
        Some(ptx) => {
            let kernels = Kernels::from_file(ptx)?;
            if kernels.manifest.spec()? != Spec::parse(file, text)? {
                return Err(Error::input(
                    ptx.display(),
                    format!("kernels of another spec, named {}", kernels.manifest.name),
                    format!("kernels of {file}"),
                    "Build them again from this spec",
                ));
            }
            kernels
        }
    };
    bar.say("loading kernels", None);
    Module::load(device, &kernels)
}

/// Operations a second of the emulator on one core, in its attention kernel, rounded.
const EMULATED_FLOPS: f64 = 4e9;

/// Refuses what nobody would wait for, unless the emulator was asked for by name.
fn check_emulation(spec: &Spec, no_gpu: &Error) -> Result<()> {
    let flops = spec.flops(HeadType::Dense) as f64 * f64::from(spec.heads) * f64::from(spec.batch);
    // Measured on two; how far it scales beyond is not known, so the estimate stops believing at 16.
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(16)) as f64;
    let minutes = flops / EMULATED_FLOPS / cores / 60.0;
    if minutes < 10.0 {
        return Ok(());
    }
    Err(Error::input(
        format!("spec {}", spec.name),
        format!(
            "{:.1} TFLOP a dense layer, some {minutes:.0} minutes in the emulator, and no GPU that runs it ({no_gpu})",
            flops / 1e12
        ),
        "what the emulator does in 10 minutes",
        "Take a machine with a Hopper GPU, try a smaller spec such as demo, or insist with --device emulator",
    ))
}

/// A progress bar on standard error, which shows itself when something takes more than a second.
struct Bar {
    bar: ProgressBar,
    started: Instant,
    shown: RefCell<bool>,
}

impl Bar {
    fn new() -> Bar {
        let bar = ProgressBar::hidden();
        bar.set_length(1000);
        let template = "{spinner} {msg:<60} [{bar:24}] {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Bar { bar, started: Instant::now(), shown: RefCell::new(false) }
    }

    fn say(&self, what: &str, part: Option<f64>) {
        self.bar.set_message(what.to_owned());
        self.bar.set_position(part.map_or(0, |part| (part * 1000.0) as u64));
        if !*self.shown.borrow() && self.started.elapsed() > Duration::from_millis(300) {
            self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            *self.shown.borrow_mut() = true;
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[derive(Serialize)]
struct HeadDescription {
    mask: &'static str,
    half_width: u32,
    visible_pairs: String,
    density: f64,
    /// Of the whole layer, were all heads of this type.
    flop: f64,
    tiles_skipped: u64,
    tiles_full: u64,
    tiles_edge: u64,
}

fn describe(argument: &str) -> Result<Outcome> {
    let (file, text) = spec_text(argument)?;
    let spec = Spec::parse(&file, &text)?;
    let layout = &spec.layout;
    let heads = HeadType::ALL.map(|head| {
        let tiles = spec.tile_counts(head);
        HeadDescription {
            mask: name_of(head),
            half_width: layout.half_width(head),
            visible_pairs: spec.visible_pairs(head).to_string(),
            density: spec.density(head),
            flop: spec.flops(head) as f64 * f64::from(spec.heads) * f64::from(spec.batch),
            tiles_skipped: tiles.skipped,
            tiles_full: tiles.full,
            tiles_edge: tiles.edge,
        }
    });
    let tiles = spec.tiles();
    let splits = profile_splits(&spec, spec.batch, spec.heads, MULTIPROCESSORS);
    let workspace = spec.workspace(spec.batch, spec.heads, splits).bytes;
    let mut out = format!(
        "{}\n  sequence   {} = {} frames x {} tokens{}; {} sink frames\n  heads      {} x {} {}, batch {}\n  tiles      {} query rows x {} key rows, {} stages\n  workspace  {:.1} MiB (on an H100 or H200)\n\n  {:<9} {:>10} {:>10} {:>12} {:>10} {:>10} {:>10}\n",
        spec.name,
        layout.sequence(),
        layout.frames,
        layout.tokens_per_frame,
        text_of(layout),
        layout.sink_frames,
        spec.heads,
        spec.head_dim,
        spec.dtype.as_str(),
        spec.batch,
        tiles.query_rows,
        tiles.key_rows,
        tiles.stages,
        workspace as f64 / f64::from(1 << 20),
        "mask",
        "half width",
        "density",
        "TFLOP",
        "skipped",
        "full",
        "edge tiles",
    );
    for head in &heads {
        out += &format!(
            "  {:<9} {:>10} {:>10.6} {:>12.4} {:>10} {:>10} {:>10}\n",
            head.mask,
            head.half_width,
            head.density,
            head.flop / 1e12,
            head.tiles_skipped,
            head.tiles_full,
            head.tiles_edge
        );
    }
    let gain = Gain::estimate(&spec);
    out += &gain_text(&spec, &gain);
    let json = json!({
        "name": spec.name,
        "sequence": layout.sequence(),
        "frames": layout.frames,
        "tokens_per_frame": layout.tokens_per_frame,
        "text_tokens": layout.text_tokens,
        "sink_frames": layout.sink_frames,
        "heads": spec.heads,
        "head_dim": spec.head_dim,
        "dtype": spec.dtype.as_str(),
        "batch": spec.batch,
        "query_tile_rows": tiles.query_rows,
        "key_tile_rows": tiles.key_rows,
        "workspace_bytes": workspace,
        "masks": heads,
        "expected_on_h200": {
            "gain": gain.over_dense(),
            "can_gain": gain.obstacle().is_none(),
            "layer_ms": gain.layer(),
            "dense_layer_ms": gain.dense_layer(),
        },
    });
    Ok(Outcome::new(out, json, true))
}

fn text_of(layout: &Layout) -> String {
    let position = match layout.text_position {
        TextPosition::First => "first",
        TextPosition::Last => "last",
    };
    match layout.text_tokens {
        0 => String::new(),
        tokens => format!(" + {tokens} text ({position})"),
    }
}

/// What a spec can gain, or why it cannot and what to do about it.
fn gain_text(spec: &Spec, gain: &Gain) -> String {
    let over_dense = format!(
        "{:.2}x, estimated for an H200:\n  a layer {:.3} ms (pack {:.3}, profile {:.3}, second pack {:.3}, attention {:.3}), dense {:.3} ms\n",
        gain.over_dense(),
        gain.layer(),
        gain.pack,
        gain.profile,
        gain.repack,
        gain.sparse_attention,
        gain.dense_layer()
    );
    match gain.obstacle() {
        None => format!("\n  expected gain over dense: {over_dense}"),
        Some(Obstacle::Density) => format!(
            "\n  this shape cannot gain: {over_dense}  Its masks (density {:.2}) leave {:.0}% of the time of dense attention; profiling pays below {:.0}%.\n  Take smaller half widths, or run it dense.\n",
            (spec.density(HeadType::Spatial) + spec.density(HeadType::Temporal)) / 2.0,
            100.0 * gain.sparse_attention / gain.dense_attention,
            100.0 * gain.affordable_attention() / gain.dense_attention
        ),
        Some(Obstacle::Tokens) => format!(
            "\n  this shape cannot gain: {over_dense}  Of {} tokens, attention is too short to pay for profiling, whatever the half widths.\n  Run it dense.\n",
            spec.layout.sequence()
        ),
    }
}

fn build(argument: &str, arch: &str, out: &Path) -> Result<Outcome> {
    let build_error = |error: framestride_builder::BuildError| Error::Build(error.to_string());
    let arch = arch.parse::<Arch>().map_err(|error| Error::Build(error.to_string()))?;
    let (file, text) = spec_text(argument)?;
    let spec = Spec::parse(&file, &text)?;
    std::fs::create_dir_all(out).map_err(|error| Error::file(out, error))?;
    let output = |extension| Output::new(&out.join(format!("{}.{extension}", spec.name)), &[Path::new(argument)]);
    let outputs = [output("ptx")?, output("json")?];
    let bar = Bar::new();
    bar.say(&format!("building {file}"), None);
    let started = Instant::now();
    let built = framestride_builder::Kernels::from_text(&file, &text).arch(arch).build().map_err(build_error)?;
    drop(bar);
    let seconds = started.elapsed().as_secs_f64();
    outputs[0].write(built.ptx.as_bytes())?;
    outputs[1].write(built.manifest.to_json().as_bytes())?;
    let files: Vec<String> = outputs.iter().map(|output| output.path().display().to_string()).collect();
    let mut lines = format!("{} in {seconds:.1} s: {}\n", built.name, files.join(", "));
    for kernel in &built.manifest.kernels {
        lines +=
            &format!("  {:<10} {:>4} threads, {:>6} bytes shared", kernel.entry, kernel.threads, kernel.shared_bytes);
        if let Some(ptxas) = &kernel.ptxas {
            lines += &format!(", {} registers, {} stack, {} spilled", ptxas.registers, ptxas.stack, ptxas.spill_stores);
        }
        lines.push('\n');
    }
    let json = json!({ "name": built.name, "seconds": seconds, "files": files, "kernels": built.manifest.kernels });
    Ok(Outcome::new(lines, json, true))
}

fn verify_spec(argument: &str, on: &On, seed: Option<u64>) -> Result<Outcome> {
    let bar = Bar::new();
    let (file, text) = spec_text(argument)?;
    let spec = Spec::parse(&file, &text)?;
    let device = choose(&spec, on)?;
    check_memory(&spec, &device)?;
    let module = load(&file, &text, &device, on, &bar)?;
    // Different each time unless asked for, and printed, so that what failed once can be had again.
    let clock =
        || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64 % 1_000_000_007);
    let seed = seed.unwrap_or_else(clock);
    let report = verify::verify(&module, seed, Effort::default(), &|what, part| bar.say(what, Some(part)))?;
    drop(bar);
    Ok(Outcome::new(verify_text(&report), to_json(&report), report.ok))
}

fn verify_text(report: &Report) -> String {
    let mut text = format!("{} on {} (seed {})\n", report.spec, report.device, report.seed);
    if !report.reduced.is_empty() {
        text += &format!("\nmemory has no room for more than\n  {}\n", report.reduced.join("\n  "));
    }
    let mut case = "";
    for check in &report.checks {
        if check.case != case {
            case = &check.case;
            text += &format!("\n{case}\n");
        }
        let verdict = if check.ok { "ok    " } else { "FAILED" };
        text += &format!(
            "  {verdict} {:<9} {:<25} error {:9.2e} of {:8.2e}, {} of {} {}",
            check.kernel, check.quantity, check.rel_error, check.tolerance, check.compared, check.of, check.unit
        );
        if !check.ok {
            text += &format!("  ({})", check.worst);
        }
        text.push('\n');
    }
    text.push('\n');
    let failed = report.checks.iter().filter(|check| !check.ok).count();
    text + &match failed {
        0 => format!("all {} checks passed\n", report.checks.len()),
        _ => format!("{failed} of {} checks failed\n", report.checks.len()),
    }
}

fn to_json(value: &impl Serialize) -> Value {
    // Strings, numbers and lists of them: there is nothing that JSON cannot hold.
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// What a command reads, and its outputs may not be.
fn inputs_of(spec: &str, on: &On, tensors: [Option<&PathBuf>; 2]) -> Vec<PathBuf> {
    let manifest = on.ptx.as_ref().map(|ptx| ptx.with_extension("json"));
    let named = tensors.into_iter().chain([on.ptx.as_ref()]).flatten().cloned();
    named.chain(manifest).chain([spec.into()]).collect()
}

/// Name of the output beside a file of tensors.
fn output_beside(tensors: &Path) -> PathBuf {
    let name = tensors.file_name().unwrap_or_default().to_string_lossy();
    tensors.with_file_name(format!("{}.out.safetensors", name.strip_suffix(".safetensors").unwrap_or(&name)))
}

fn run_spec(run: Run) -> Result<Outcome> {
    let Run { spec: argument, on, video, qkv, scale, dense_heads, text_lengths, out, report } = run;
    let bar = Bar::new();
    let (file, text) = spec_text(&argument)?;
    let spec = Spec::parse(&file, &text)?;
    // Outputs and inputs first: what is wrong with them is said before anything is built.
    let read = inputs_of(&argument, &on, [video.as_ref(), qkv.as_ref()]);
    let read: Vec<&Path> = read.iter().map(PathBuf::as_path).collect();
    let out = out.or_else(|| qkv.as_deref().map(output_beside));
    let heads = video.as_ref().map(|_| spec.heads as usize);
    let report = report.map(|folder| report::Report::new(&folder, heads, &read)).transpose()?;
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
    let device = choose(&spec, &on)?;
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
    inputs.text_lengths = text_lengths.or(inputs.text_lengths);
    inputs.check(&spec, "inputs")?;
    check_dense_heads(&dense_heads, inputs.q.heads, "--dense-heads")?;
    let module = load(&file, &text, &device, &on, &bar)?;
    let place = module.device().name();
    let progress = |what: &str, part| bar.say(&format!("{what} ({place})"), part);
    let run = framestride::run::run(&module, &inputs, &dense_heads, &progress)?;
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

/// What a file of tensors left open, and what was taken.
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

fn run_text(report: &RunReport) -> String {
    let [batch, rows, heads, head_dim] = report.shape;
    let mut text = format!(
        "{} on {}: {batch} x {rows} tokens x {heads} heads x {head_dim}\n\n{:>5} {:>5} {:>14} {:>14} {:>9} {:>8} {:>12} {:>11} {:>10}\n",
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
        "vs dense"
    );
    for head in &report.heads {
        text += &format!(
            "{:>5} {:>5} {:>14.4e} {:>14.4e} {:>9} {:>8.4} {:>12.2e} {:>11.2e} {:>10.2e}{}\n",
            head.batch,
            head.head,
            head.spatial_error,
            head.temporal_error,
            head.mask,
            head.density,
            head.rel_error,
            head.tolerance,
            head.dense_rel_error,
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
        text += &format!("{:<10} {:>12.3} ms\n", kernel.kernel, kernel.milliseconds);
    }
    text
}

/// When a bench does a round.
enum Rounds {
    /// So many times.
    Count(u32),
    /// For each line on standard input.
    Paced,
}

fn bench_spec(
    argument: &str,
    on: &On,
    rounds: Rounds,
    options: Options,
    qkv: Option<PathBuf>,
    out: Option<PathBuf>,
) -> Result<Outcome> {
    let bar = Bar::new();
    let (file, text) = spec_text(argument)?;
    let spec = Spec::parse(&file, &text)?;
    if out.is_some() && options.timed.len() != 1 {
        return Err(Error::input(
            "--out",
            format!("{} --types", options.timed.len()),
            "one, whose output it is",
            "Say which with --types",
        ));
    }
    let read = inputs_of(argument, on, [qkv.as_ref(), None]);
    let read: Vec<&Path> = read.iter().map(PathBuf::as_path).collect();
    let out = out.map(|out| Output::new(&out, &read)).transpose()?;
    let (device, passed_over) = Device::choose(on.device)?;
    if matches!(device, Device::Emulator(_)) {
        let why = passed_over.map_or(String::new(), |reason| format!(" ({reason})"));
        return Err(Error::input(
            "--device",
            format!("the emulator, whose times say nothing about a GPU's{why}"),
            "a Hopper GPU (H100, H200)",
            "Run it on a machine with one; `framestride doctor` shows what is found here",
        ));
    }
    bar.say("inputs", None);
    let inputs = qkv.map(|path| load_inputs(&path, &spec)).transpose()?;
    let module = load(&file, &text, &device, on, &bar)?;
    bar.say("inputs to the device", None);
    let mut bench = Bench::new(&module, inputs.as_ref(), &options)?;
    match rounds {
        Rounds::Count(rounds) => {
            for round in 0..rounds {
                let part = f64::from(round) / f64::from(rounds);
                bench.round(&|what| bar.say(what, Some(part)))?;
            }
        }
        Rounds::Paced => {
            print("ready\n")?;
            for (round, line) in std::io::stdin().lines().enumerate() {
                line.map_err(|error| Error::file("standard input", error))?;
                bench.round(&|_| {})?;
                print(&format!("round {round}\n"))?;
            }
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

fn bench_text(report: &bench::Report) -> String {
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

fn plot(argument: &str, out: &Path) -> Result<Outcome> {
    let (file, text) = spec_text(argument)?;
    let spec = Spec::parse(&file, &text)?;
    let out = Output::new(out, &[Path::new(argument)])?;
    let bar = Bar::new();
    bar.say("drawing masks", None);
    report::save(&out, &masks::picture(&spec, &HeadType::ALL))?;
    drop(bar);
    let file = out.path().display().to_string();
    let outcome = Outcome::new(format!("wrote {file}\n"), json!({ "files": [file] }), true);
    Ok(Outcome { aside: out.is_stdout(), ..outcome })
}

fn doctor() -> Outcome {
    let tools = toolchain::Report::new();
    let gpu = Gpu::primary(0);
    let (gpu_text, gpu_json) = match &gpu {
        Ok(gpu) => {
            let (major, minor) = gpu.capability();
            let driver = gpu.driver_version();
            let missing = gpu.check().err().map(|error| error.to_string());
            let fit = missing.as_ref().map_or("runs the kernels".into(), |missing| {
                format!("does not run the kernels; the emulator takes its place\n  {}", missing.replace('\n', "\n  "))
            });
            (
                format!(
                    "found   GPU        {}, compute capability {major}.{minor}, driver for CUDA {}: {fit}\n",
                    gpu.name(),
                    cuda_version(driver)
                ),
                json!({
                    "name": gpu.name(),
                    "capability": format!("{major}.{minor}"),
                    "driver": driver,
                    "runs_kernels": missing.is_none(),
                    "missing": missing,
                }),
            )
        }
        Err(error) => (
            format!("absent  GPU        {error}; the emulator takes its place\n"),
            json!({ "missing": error.to_string(), "runs_kernels": false }),
        ),
    };
    let shipped: Vec<&str> = Kernels::shipped_names().collect();
    let text = format!("{tools}{gpu_text}shipped kernels: {}\n", shipped.join(", "));
    let json = json!({ "can_build": tools.can_build(), "tools": tools, "gpu": gpu_json, "shipped": shipped });
    Outcome::new(text, json, true)
}
