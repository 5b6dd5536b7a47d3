//! `framestride study` on heads that were planted, so that the right masks are known.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use framestride::Spec;
use framestride::shapes::density::half_width_of_density;
use framestride::shapes::layout::HeadType;
use framestride_check::reference::Reference;
use framestride_check::tensors::{Inputs, Tokens};
use framestride_study::Study;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// 8 frames of 48 patches.
const SPEC: &str = "name = \"planted\"
[video]
frames = 8
tokens_per_frame = 48
grid = [6, 8]
[text]
tokens = 16
position = \"first\"
[attention]
heads = 2
head_dim = 64
dtype = \"bf16\"
batch = 2
[masks.spatial]
density = 0.5
[masks.temporal]
density = 0.5
";
const SHAPE: [usize; 4] = [2, 400, 2, 64];
/// Text alone takes more than the first one.
const DENSITIES: [f64; 3] = [0.05, 0.3, 0.6];

fn spec() -> Spec {
    Spec::parse("planted.toml", SPEC).unwrap()
}

/// A spatial and a temporal head, in this order or in the other one, or two heads that no mask
/// suits.
#[derive(Clone, Copy, PartialEq)]
enum Heads {
    SpatialTemporal,
    TemporalSpatial,
    Neither,
}

fn inputs(heads: Heads, seed: u64) -> Inputs {
    let spec = spec();
    match heads {
        Heads::Neither => Inputs::random(&spec, SHAPE[0], SHAPE[2], seed),
        Heads::SpatialTemporal => Inputs::planted(&spec, SHAPE[0], SHAPE[2], seed),
        Heads::TemporalSpatial => {
            let mut inputs = Inputs::planted(&spec, SHAPE[0], SHAPE[2], seed);
            for tokens in [&mut inputs.q, &mut inputs.k, &mut inputs.v] {
                tokens.bits.as_chunks_mut::<128>().0.iter_mut().for_each(|token| token.rotate_left(64));
            }
            inputs
        }
    }
}

fn write(file: &Path, inputs: &Inputs) {
    write_of(file, inputs, SHAPE);
}

fn write_of(file: &Path, inputs: &Inputs, shape: [usize; 4]) {
    let bytes = |tokens: &Tokens| tokens.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
    let data = [("q", bytes(&inputs.q)), ("k", bytes(&inputs.k)), ("v", bytes(&inputs.v))];
    let views = data.iter().map(|(name, data)| (*name, TensorView::new(Dtype::BF16, shape.to_vec(), data).unwrap()));
    fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn study(folder: &Path, arguments: &[&str]) -> Output {
    study_of(folder, "planted.toml", arguments)
}

fn study_of(folder: &Path, spec: &str, arguments: &[&str]) -> Output {
    fs::write(folder.join("planted.toml"), SPEC).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_framestride"));
    command.current_dir(folder).args(["study", spec, "--device", "emulator"]).args(arguments);
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Files of two steps of three layers, given in another order than that of their names.
#[test]
fn files_of_steps_and_layers() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let layers = [
        ("step_0_layer_0.safetensors", Heads::TemporalSpatial, 1),
        ("step_0_layer_1.safetensors", Heads::SpatialTemporal, 2),
        ("step_0_layer_10.safetensors", Heads::Neither, 3),
        ("step_12_layer_0.safetensors", Heads::Neither, 4),
        ("step_12_layer_1.safetensors", Heads::SpatialTemporal, 5),
    ];
    layers.iter().for_each(|&(name, heads, seed)| write(&at(name), &inputs(heads, seed)));
    let names = [4, 2, 0, 3, 1].map(|number: usize| layers[number].0);
    let options = ["--densities", "0.3,0.05,0.6", "--error", "0.1", "--steps", "50", "--noise", "1,0.8"];
    let more = ["--layers", "12", "--model", "WanTransformer3DModel", "--out", "schedule.json", "--report", "report"];
    let said = text(&study(folder.path(), &[&names[..], &options, &more].concat()));
    let found = fs::read_to_string(at("report/study.json")).unwrap();
    let found = Study::parse("study.json", &found).unwrap();
    assert_eq!((found.video, found.sampled_rows, &found.densities[..]), ([8, 6, 8], 64, &DENSITIES[..]));
    assert_eq!((found.models[0].name.as_str(), found.models[0].layers), ("WanTransformer3DModel", 12));
    let steps: Vec<_> = found.steps.iter().map(|step| (step.index, step.count, step.noise)).collect();
    assert_eq!(steps, [(0, 50, Some(1.0)), (12, 50, Some(0.8))]);

    for (name, heads, seed) in layers {
        let (step, layer) = (
            usize::from(name.contains("step_12")),
            if name.contains("10") { 10 } else { usize::from(name.contains("layer_1")) },
        );
        let layer = found.steps[step].layers[layer].as_ref().unwrap_or_else(|| panic!("{name}"));
        assert_eq!(layer.errors[0], [[None; 2]; 2], "{name}");
        let inputs = inputs(heads, seed);
        for head in 0..2 {
            let (size, errors) = expected(&inputs, head);
            let near = |found: Option<f64>, expected: f64| (found.unwrap() / expected - 1.0).abs() < 0.03;
            assert!(near(layer.size[head], size), "{name}: {:?} {size}", layer.size[head]);
            for (density, expected) in [1, 2].into_iter().zip(errors) {
                let found = layer.errors[density][head];
                // What rounding alone explains is no error of a mask.
                let right = |mask: usize| near(found[mask], expected[mask]) || expected[mask] < 1e-4 * size;
                assert!(right(0) && right(1), "{name}: {found:?} {expected:?}");
                let spatial = (heads == Heads::SpatialTemporal) == (head == 0);
                let [better, worse] = if spatial { found } else { [found[1], found[0]] };
                assert!(heads == Heads::Neither || better < worse.map(|worse| worse / 2.0), "{name}: {found:?}");
            }
        }
    }
    let schedule: Value = serde_json::from_str(&fs::read_to_string(at("schedule.json")).unwrap()).unwrap();
    let density = |step: usize, layer: usize| schedule["steps"][step]["density"][layer].as_f64();
    assert_eq!(
        [density(0, 0), density(0, 1), density(0, 10), density(1, 0), density(1, 1)].map(Option::unwrap),
        [0.3, 0.3, 1.0, 1.0, 0.3]
    );
    assert_eq!((density(0, 2), density(1, 10)), (None, None));
    assert_eq!(schedule["steps"][0]["density"].as_array().unwrap().len(), 12);
    assert_eq!((&schedule["framestride_schedule"], &schedule["error"]), (&1.into(), &0.1.into()));

    let png = fs::read(at("report/study.png")).unwrap();
    assert!(image::load_from_memory(&png).unwrap().width() > 600);
    assert!(said.contains("19 layers of steps are in no file") && said.contains("wrote schedule.json"), "{said}");
    assert!(said.contains(" dense ") && said.contains("allowed error 0.1"), "{said}");
}

/// The mean square of a head's dense output, and the errors of both masks at the last two
/// densities, by the f64 reference.
fn expected(inputs: &Inputs, head: usize) -> (f64, [[f64; 2]; 2]) {
    let spec = spec();
    let [batch, _, heads, head_dim] = SHAPE;
    let (first, rows) = (spec.layout.before as usize, spec.layout.video_tokens() as usize);
    let (mut size, mut errors) = (0.0, [[0.0; 2]; 2]);
    for item in 0..batch {
        let reference = Reference::new(&spec, inputs);
        let of_head = reference.head(item, head);
        for row in first..first + rows {
            let out = of_head.attend(HeadType::Dense, row, inputs.scale()).out;
            size += out.iter().map(|value| value * value).sum::<f64>() / (rows * head_dim * batch) as f64;
        }
        for (density, errors) in DENSITIES[1..].iter().zip(&mut errors) {
            let half_width = |mask| half_width_of_density(&spec.layout, mask, *density);
            let layout = framestride::shapes::layout::Layout {
                spatial_half_width: half_width(HeadType::Spatial),
                temporal_half_width: half_width(HeadType::Temporal),
                ..spec.layout
            };
            let other = Spec { layout, ..spec.clone() };
            let head = Reference::new(&other, inputs).head(item, head).profile(
                &layout,
                inputs.scale(),
                0,
                (item * heads + head) as u32,
                64,
            );
            errors.iter_mut().zip(head.errors).for_each(|(sum, error)| *sum += error / batch as f64);
        }
    }
    (size, errors)
}

#[test]
fn files_without_layers_in_their_names_are_layers_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("b.safetensors"), &inputs(Heads::SpatialTemporal, 7));
    write(&folder.path().join("a.safetensors"), &inputs(Heads::TemporalSpatial, 8));
    let said = text(&study(folder.path(), &["b.safetensors", "a.safetensors", "--densities", "0.3", "--by-head"]));
    let better: Vec<Vec<&str>> = said
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.first() == Some(&"0"))
        .map(|words| words[2..5].to_vec())
        .collect();
    let expected = [["0", "0", "spatial"], ["0", "1", "temporal"], ["1", "0", "temporal"], ["1", "1", "spatial"]];
    assert_eq!(better, expected.map(|words| words.to_vec()), "{said}");
    assert!(said.contains("planted, 2 layers"), "{said}");
    // On standard output there is the schedule alone.
    let output = study(folder.path(), &["a.safetensors", "--densities", "0.3", "--out", "/dev/stdout"]);
    assert!(serde_json::from_str::<Value>(&text(&output)).unwrap()["framestride_schedule"] == 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("relative errors of layers"));
}

/// Of head dim 128, since no other one has 8 bits.
#[test]
fn eight_bits_are_tried_beside_16() {
    let folder = tempfile::tempdir().unwrap();
    let text_of = |compute: &str| {
        SPEC.replace("head_dim = 64", &format!("head_dim = 128\ncompute = \"{compute}\""))
            .replace("frames = 8", "frames = 4")
    };
    let spec = Spec::parse("planted.toml", &text_of("dtype")).unwrap();
    let mut inputs = Inputs::planted(&spec, 1, 2, 5);
    // V of head 0 is the same in all rows, of which 8 bits take nothing.
    for token in inputs.v.bits.as_chunks_mut::<256>().0 {
        token[..128].fill(0x4080);
    }
    let shape = [1, spec.layout.sequence() as usize, 2, 128];
    write_of(&folder.path().join("layer_0.safetensors"), &inputs, shape);
    let mut found = Vec::new();
    for (compute, option) in [("dtype", &["--compute", "e4m3"][..]), ("e4m3", &[]), ("e4m3", &["--compute", "dtype"])] {
        fs::write(folder.path().join("spec.toml"), text_of(compute)).unwrap();
        let options = ["layer_0.safetensors", "--densities", "0.1,0.6", "--error", "0.002", "--report", "report"];
        let said =
            text(&study_of(folder.path(), "spec.toml", &[&options[..], &["--out", "schedule.json"], option].concat()));
        let study = Study::parse("study.json", &fs::read_to_string(folder.path().join("report/study.json")).unwrap());
        let schedule: Value =
            serde_json::from_str(&fs::read_to_string(folder.path().join("schedule.json")).unwrap()).unwrap();
        found.push((study.unwrap(), schedule, said));
    }
    // The spec says it, or the option.
    assert!(found[0].0 == found[1].0 && found[0].1 == found[1].1);
    let [of_8_bits, _, of_16_bits] =
        [0, 1, 2].map(|number: usize| found[number].0.steps[0].layers[0].as_ref().unwrap());
    assert_eq!((&of_8_bits.size, &of_8_bits.errors), (&of_16_bits.size, &of_16_bits.errors));
    assert!(of_16_bits.eight_bits.is_none());
    let errors = of_8_bits.eight_bits.as_ref().unwrap();
    // Text alone takes more than the first density.
    assert_eq!(errors[0], [None, None]);
    let relative =
        |density: usize, head: usize| (errors[density][head].unwrap() / of_8_bits.size[head].unwrap()).sqrt();
    for density in [1, 2] {
        assert!(relative(density, 0) < 0.002 && (0.005..0.1).contains(&relative(density, 1)), "{errors:?}");
    }
    // So head 1 decides, and where it exceeds the error it stays in 16 bits.
    assert!(found[0].2.contains("8 bits:") && !found[2].2.contains("8 bits"), "{}", found[0].2);
    assert_eq!(
        (&found[0].1["steps"][0]["compute"][0], &found[2].1["steps"][0]["compute"]),
        (&"e4m3".into(), &Value::Null)
    );
    assert_eq!(found[0].1["steps"][0]["heads_in_16_bits"][0], serde_json::json!([1]));

    fs::write(folder.path().join("spec.toml"), text_of("dtype")).unwrap();
    for (spec, options, words) in [
        ("planted.toml", &["--compute", "e4m3"][..], "head_dim"),
        ("spec.toml", &["--compute", "fp8"], "possible values: dtype, e4m3"),
        ("spec.toml", &["--compute", "e4m3", "--ptx", "some.ptx"], "--ptx: found some.ptx, and 8 bits to be tried"),
    ] {
        let output = study_of(folder.path(), spec, &[&["layer_0.safetensors"][..], options].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(words), "{words}: {error}");
    }
}

#[test]
fn what_is_wrong_is_said_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("step_4_layer_1.safetensors"), &inputs(Heads::Neither, 9));
    for other in ["layer_1.safetensors", "step_4.safetensors", "other_step_4_layer_01.safetensors"] {
        fs::copy(at("step_4_layer_1.safetensors"), at(other)).unwrap();
    }
    fs::write(at("layer_9.safetensors"), "no tensors").unwrap();
    let right = "step_4_layer_1.safetensors";
    for (arguments, words) in [
        (&[][..], "required"),
        (&[right, "layer_1.safetensors"], "layer_1.safetensors: found a name without step and its number"),
        (&[right, "step_4.safetensors"], "step_4.safetensors: found a name without layer and its number"),
        (&[right, "other_step_4_layer_01.safetensors"], "found layer 1 of step 4, as step_4_layer_1.safetensors is"),
        (&[right], "--steps: found none, and a file of step 4"),
        (&[right, "--steps", "4"], "--steps: found 4, and a file of step 4"),
        (&["layer_1.safetensors", "--layers", "1"], "--layers: found 1, and a file of layer 1"),
        (&["layer_1.safetensors", "--layers", "5000000000"], "layers: found 5000000000"),
        (&["layer_4000000000.safetensors"], "layers: found 4000000001"),
        (&["layer_1.safetensors", "--noise", "1,0.5"], "--noise: found [1.0, 0.5]"),
        (&["layer_1.safetensors", "--noise", "1.5"], "--noise: found [1.5]"),
        (&["layer_1.safetensors", "--densities", "0.5,0"], "--densities: found 0"),
        (&["layer_1.safetensors", "--error", "1"], "error: found 1"),
        (&["layer_1.safetensors", "--out", "layer_1.safetensors"], "a file that this run reads"),
        (&["layer_1.safetensors", "--out", "r/study.json", "--report", "r"], "a file of the report"),
        (&["layer_9.safetensors"], "layer_9.safetensors: found"),
        (&["none.safetensors"], "none.safetensors"),
    ] {
        fs::create_dir_all(at("r")).unwrap();
        let output = study(folder.path(), arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(words), "{words}: {error}");
        assert!(output.stdout.is_empty());
    }
}
