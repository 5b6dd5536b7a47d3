//! Everything that can be wrong with a tensor file, each with its message.

use std::fmt::Write;
use std::path::Path;

use framestride::Kernels;
use framestride::shapes::arch::Arch;
use framestride::shapes::spec::Spec;
use framestride_check::rope::RopeTables;
use framestride_check::tensors::{Inputs, Tokens};
use framestride_cli::tensor_files::{load_frames, load_inputs};
use framestride_cli::video;
use safetensors::tensor::{Dtype, TensorView};

/// A spec of 5 frames of 23 tokens, 24 text tokens, 2 heads of 64, bf16, rms norm and RoPE.
const SPEC: &str = "tiny_text_last";

fn spec(name: &str) -> Spec {
    let (_, text) = framestride::shapes::models().iter().find(|(found, _)| *found == name).unwrap();
    Spec::parse(name, text).unwrap()
}

type Stored = (&'static str, Dtype, Vec<usize>);

/// A file of zeros.
fn file(tensors: &[Stored]) -> Vec<u8> {
    file_of(tensors, &[])
}

/// A file of zeros, but for the last tensor when `last` gives its bytes.
fn file_of(tensors: &[Stored], last: &[u8]) -> Vec<u8> {
    let zeros = |(_, dtype, shape): &Stored| vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
    let mut data: Vec<Vec<u8>> = tensors.iter().map(zeros).collect();
    if let Some(data) = data.last_mut().filter(|_| !last.is_empty()) {
        *data = last.to_vec();
    }
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, dtype, shape), data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn qkv() -> Vec<Stored> {
    ["q", "k", "v"].map(|name| (name, Dtype::BF16, vec![1, 139, 2, 64])).to_vec()
}

/// Q, K and V, with some tensors added or put in place of others.
fn with(changes: &[Stored]) -> Vec<u8> {
    let mut tensors = qkv();
    tensors.retain(|(name, ..)| !changes.iter().any(|(changed, ..)| changed == name));
    tensors.extend_from_slice(changes);
    file(&tensors)
}

#[test]
fn tensor_files() {
    let spec = spec(SPEC);
    let folder = tempfile::tempdir().unwrap();
    let whole = with(&[]);
    let without_v: Vec<Stored> = qkv().into_iter().filter(|(name, ..)| *name != "v").collect();
    let with_length = |dtype: Dtype, length: [u8; 4]| {
        let mut tensors = qkv();
        tensors.push(("text_lengths", dtype, vec![1]));
        file_of(&tensors, &length)
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("truncated", whole[..whole.len() - 1].to_vec()),
        ("not a tensor file", b"name = \"a spec\"".to_vec()),
        ("empty", Vec::new()),
        ("missing key", file(&without_v)),
        ("wrong type", with(&[("k", Dtype::I32, vec![1, 139, 2, 64])])),
        ("three dimensions", with(&[("q", Dtype::BF16, vec![139, 2, 64])])),
        ("other tokens", with(&[("q", Dtype::BF16, vec![1, 138, 2, 64])])),
        ("heads first, and other tokens", with(&[("q", Dtype::BF16, vec![1, 2, 138, 64])])),
        ("part of a head", with(&[("q", Dtype::BF16, vec![1, 139, 96])])),
        ("other heads", with(&[("k", Dtype::BF16, vec![1, 139, 1, 64])])),
        (
            "as many heads as tokens",
            file(&["query", "key", "value"].map(|name| (name, Dtype::BF16, vec![1, 139, 139, 64]))),
        ),
        ("another head dim", with(&[("v", Dtype::F32, vec![1, 139, 2, 128])])),
        ("another batch", with(&[("k", Dtype::BF16, vec![2, 139, 2, 64])])),
        ("no batch", file(&["q", "k", "v"].map(|name| (name, Dtype::BF16, vec![0, 139, 2, 64])))),
        (
            "a million heads of no batch",
            file(&["q", "k", "v"].map(|name| (name, Dtype::BF16, vec![0, 139, 1_000_000, 64]))),
        ),
        ("a misspelt name", with(&[("q_norm.wieght", Dtype::F32, vec![64])])),
        ("a singular", with(&[("text_length", Dtype::I64, vec![1])])),
        ("a scale", with(&[("scale", Dtype::F32, vec![])])),
        ("masks", with(&[("masks", Dtype::U8, vec![139, 139])])),
        ("a norm of cross-attention", with(&[("blocks.3.attn2.norm_q.weight", Dtype::F32, vec![64])])),
        (
            "two layers",
            with(&[
                ("blocks.3.attn1.norm_q.weight", Dtype::F32, vec![64]),
                ("blocks.4.attn1.norm_q.weight", Dtype::F32, vec![64]),
            ]),
        ),
        ("a name twice", with(&[("query", Dtype::BF16, vec![1, 139, 2, 64])])),
        ("cos alone", with(&[("cos", Dtype::F32, vec![115, 32])])),
        ("tables for text too", with(&[("cos", Dtype::F32, vec![139, 32]), ("sin", Dtype::F32, vec![139, 32])])),
        ("a transposed table", with(&[("cos", Dtype::F32, vec![115, 32]), ("sin", Dtype::F32, vec![32, 115])])),
        ("a table of integers", with(&[("cos", Dtype::I64, vec![115, 32]), ("sin", Dtype::F32, vec![115, 32])])),
        ("a norm over heads", with(&[("q_norm.weight", Dtype::F32, vec![128])])),
        ("an rms norm with a bias", with(&[("k_norm_text.bias", Dtype::F32, vec![64])])),
        ("lengths of another batch", with(&[("text_lengths", Dtype::I64, vec![2])])),
        ("a negative length", with_length(Dtype::I32, (-1i32).to_le_bytes())),
        ("a length beyond the text", with_length(Dtype::U32, 25u32.to_le_bytes())),
        (
            "a length for two",
            file_of(
                &[
                    &["q", "k", "v"].map(|name| (name, Dtype::BF16, vec![2, 139, 2, 64]))[..],
                    &[("text_lengths", Dtype::U8, vec![])],
                ]
                .concat(),
                &[1],
            ),
        ),
        ("Q alone of the text", with(&[("q_text", Dtype::BF16, vec![1, 24, 2, 64])])),
        (
            "text apart and in Q too",
            with(&["q_text", "k_text", "v_text"].map(|name| (name, Dtype::BF16, vec![1, 24, 2, 64]))),
        ),
        (
            "text apart, of another batch",
            with(&[
                ("q", Dtype::BF16, vec![1, 115, 2, 64]),
                ("k", Dtype::BF16, vec![1, 115, 2, 64]),
                ("v", Dtype::BF16, vec![1, 115, 2, 64]),
                ("encoder_query", Dtype::BF16, vec![2, 24, 2, 64]),
                ("encoder_key", Dtype::BF16, vec![2, 24, 2, 64]),
                ("encoder_value", Dtype::BF16, vec![2, 24, 2, 64]),
            ]),
        ),
        ("lengths of floats", with(&[("text_lengths", Dtype::F32, vec![1])])),
    ];
    let mut messages = String::new();
    for (name, bytes) in cases {
        let path = folder.path().join("qkv.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let error = load_inputs(&path, &spec).err().unwrap_or_else(|| panic!("{name} was accepted")).to_string();
        writeln!(messages, "## {name}\n{}", error.replace(&path.display().to_string(), "qkv.safetensors")).unwrap();
    }
    let missing = load_inputs(Path::new("no/such.safetensors"), &spec).unwrap_err();
    writeln!(messages, "## missing file\n{missing}").unwrap();
    insta::assert_snapshot!(messages);

    std::fs::write(folder.path().join("good"), whole).unwrap();
    load_inputs(&folder.path().join("good"), &spec).unwrap();
}

/// A type that cannot hold a finite number is an error that says tensor, element, number and limit.
#[test]
fn numbers_that_overflow() {
    let bytes32 = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let bytes64 = |values: &[f64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qkv.safetensors");
    let with_last = |spec: &Spec, stored: Stored, data: &[u8]| {
        let shape = vec![1, spec.layout.sequence() as usize, 1, spec.head_dim as usize];
        let mut tensors = ["q", "k", "v"].map(|name| (name, Dtype::BF16, shape.clone())).to_vec();
        tensors.retain(|(name, ..)| *name != stored.0);
        tensors.push(stored);
        std::fs::write(&path, file_of(&tensors, data)).unwrap();
        load_inputs(&path, spec)
    };
    let mut messages = String::new();
    // The number stands at [0, 2, 0, 3].
    let (bf16, f16) = (spec(SPEC), spec("tiny_layer_half"));
    for (spec, value, is_wide) in [
        (&f16, 70000.0, false),
        (&f16, -65520.0, false),
        (&f16, 1e300, true),
        (&bf16, 3.4e38, false),
        (&bf16, -1e39, true),
    ] {
        let (sequence, head_dim) = (spec.layout.sequence() as usize, spec.head_dim as usize);
        let mut values = vec![0.0; sequence * head_dim];
        values[2 * head_dim + 3] = value;
        let singles: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        let (dtype, data) = if is_wide { (Dtype::F64, bytes64(&values)) } else { (Dtype::F32, bytes32(&singles)) };
        let error = with_last(spec, ("k", dtype, vec![1, sequence, 1, head_dim]), &data).unwrap_err();
        writeln!(messages, "## {value:e} in {}\n{error}", spec.dtype.as_str()).unwrap();
    }
    let mut weights = vec![1.0; 64];
    weights[5] = 1e39;
    let error = with_last(&bf16, ("q_norm.weight", Dtype::F64, vec![64]), &bytes64(&weights)).unwrap_err();
    writeln!(messages, "## a weight\n{error}").unwrap();
    insta::assert_snapshot!(messages.replace(&path.display().to_string(), "qkv.safetensors"));

    // A number that rounds to the largest one is taken, and so is an infinity, which is meant.
    let shape = vec![1, f16.layout.sequence() as usize, 1, 128];
    let mut values = vec![65519.0; shape.iter().product()];
    values[7] = f32::INFINITY;
    let inputs = with_last(&f16, ("v", Dtype::F32, shape), &bytes32(&values)).unwrap();
    assert_eq!((inputs.v.bits[6], inputs.v.bits[7]), (0x7bff, 0x7c00));
}

/// The names and shapes of diffusers give the same inputs as those of this project.
#[test]
fn tensors_as_diffusers_has_them() {
    let spec = spec(SPEC);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qkv.safetensors");
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let load = |tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]| {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        load_inputs(&path, &spec)
    };
    let mut inputs = Inputs::random(&spec, 2, 2, 3);
    inputs.after.lengths = Some(vec![7, 24]);
    let bits = |tokens: &Tokens| tokens.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
    let heads_first = |tokens: &Tokens| -> Vec<u8> {
        let rows =
            (0..2).flat_map(|item| (0..2).flat_map(move |head| (0..139).map(move |row| tokens.index(item, row, head))));
        rows.flat_map(|index| tokens.bits[index..][..64].iter().flat_map(|bits| bits.to_le_bytes())).collect()
    };
    let tables = inputs.rope.clone().unwrap();
    assert_eq!(tables.items, 2);
    assert_eq!(spec.rope.unwrap().pairs, framestride::shapes::spec::Pairs::Interleaved);
    let twice = |table: &[f32]| bytes(&table.iter().flat_map(|&value| [value, value]).collect::<Vec<f32>>());
    let norm = |norm: &Option<Vec<f32>>| bytes(norm.as_ref().unwrap());
    let text = |norm: &Option<framestride_check::tensors::Norm>| bytes(norm.as_ref().unwrap().weight.as_ref().unwrap());
    let theirs = [
        ("query", Dtype::BF16, vec![2, 2, 139, 64], heads_first(&inputs.q)),
        ("key", Dtype::BF16, vec![2, 139, 128], bits(&inputs.k)),
        ("value", Dtype::BF16, vec![2, 139, 2, 64], bits(&inputs.v)),
        ("freqs_cos", Dtype::F32, vec![2, 115, 64], twice(&tables.cos)),
        ("freqs_sin", Dtype::F32, vec![2, 115, 1, 64], twice(&tables.sin)),
        ("transformer_blocks.0.attn.norm_q.weight", Dtype::F32, vec![64], norm(&inputs.q_norm.weight)),
        ("attn1.norm_k.weight", Dtype::F32, vec![64], norm(&inputs.k_norm.weight)),
        ("norm_added_q.weight", Dtype::F32, vec![64], text(&inputs.after.q_norm)),
        ("attn.norm_added_k.weight", Dtype::F32, vec![64], text(&inputs.after.k_norm)),
        ("text_lengths", Dtype::U64, vec![2, 1], [7u64, 24].iter().flat_map(|length| length.to_le_bytes()).collect()),
    ];
    assert_eq!(load(&theirs).unwrap(), inputs);

    // Batch items may share their tables.
    let shared = RopeTables { items: 1, cos: tables.cos[..115 * 32].to_vec(), sin: tables.sin[..115 * 32].to_vec() };
    let mut one = theirs.clone();
    (one[3].2, one[3].3) = (vec![115, 64], twice(&shared.cos));
    let error = load(&one).unwrap_err().to_string();
    assert!(error.contains("tensor freqs_sin: found 2 tables, and 1 in cos"), "{error}");
    (one[4].2, one[4].3) = (vec![115, 32], bytes(&shared.sin));
    assert_eq!(load(&one).unwrap(), Inputs { rope: Some(shared), ..inputs.clone() });

    // For the other pairs of channels, the two numbers of a pair differ.
    let halves = |table: &[f32]| bytes(&table.chunks(32).flat_map(|row| [row, row].concat()).collect::<Vec<f32>>());
    let mut other = theirs.clone();
    other[3].3 = halves(&tables.cos);
    let error = load(&other).unwrap_err().to_string();
    assert!(error.contains("tensor freqs_cos: found") && error.contains("rope.pairs = \"interleaved\""), "{error}");
    // These are pairs of halves, as Cosmos has them.
    let half = self::spec("tiny_layer_half");
    assert_eq!(half.rope.unwrap().pairs, framestride::shapes::spec::Pairs::Half);
    let table: Vec<f32> = (0..231 * 64).map(|index| index as f32).collect();
    let tables = bytes(&table.chunks(64).flat_map(|row| [row, row].concat()).collect::<Vec<f32>>());
    let tensors = ["q", "k", "v"].map(|name| (name, Dtype::F16, vec![1, 231, 256], vec![0; 231 * 512])).to_vec();
    let of_halves = ["cos", "freqs_sin"].map(|name| (name, Dtype::F32, vec![1, 1, 231, 128], tables.clone()));
    load(&[tensors, of_halves.to_vec()].concat()).unwrap_err();
    assert_eq!(load_inputs(&path, &half).unwrap().rope.unwrap().sin, table);

    // One batch item may have one length without a shape.
    let one = ["q", "k", "v"].map(|name| (name, Dtype::BF16, vec![1, 139, 2, 64], vec![0; 139 * 256]));
    let length = ("text_lengths", Dtype::I16, vec![], 5i16.to_le_bytes().to_vec());
    assert_eq!(load(&[&one[..], &[length]].concat()).unwrap().after.lengths, Some(vec![5]));
}

#[test]
fn tables_and_norms_that_the_spec_does_not_have() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qkv.safetensors");
    let plain = ["q", "k", "v"].map(|name| (name, Dtype::BF16, vec![1, 384, 1, 128]));
    let mut messages = String::new();
    for extra in [
        vec![("cos", Dtype::F32, vec![384, 64]), ("sin", Dtype::F32, vec![384, 64])],
        vec![("q_norm.weight", Dtype::F32, vec![128])],
    ] {
        std::fs::write(&path, file(&[&plain[..], &extra].concat())).unwrap();
        let error = load_inputs(&path, &spec("tiny_plain")).unwrap_err().to_string();
        writeln!(messages, "{}", error.replace(&path.display().to_string(), "qkv.safetensors")).unwrap();
    }
    insta::assert_snapshot!(messages);
}

#[test]
fn videos() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("video.safetensors");
    let mut messages = String::new();
    let cases: [(&str, &str, Stored); 6] = [
        ("missing key", "demo", ("video", Dtype::U8, vec![16, 72, 128, 3])),
        ("floats", "demo", ("frames", Dtype::F32, vec![16, 72, 128, 3])),
        ("channels first", "demo", ("frames", Dtype::U8, vec![16, 3, 72, 128])),
        ("too few frames", "demo", ("frames", Dtype::U8, vec![15, 72, 128, 3])),
        ("fewer pixels than patches", "demo", ("frames", Dtype::U8, vec![16, 8, 128, 3])),
        ("a spec without grid", SPEC, ("frames", Dtype::U8, vec![16, 72, 128, 3])),
    ];
    for (name, model, stored) in cases {
        std::fs::write(&path, file(&[stored])).unwrap();
        let error = load_frames(&path)
            .and_then(|frames| video::inputs(&spec(model), 2, &frames, "video.safetensors"))
            .err()
            .unwrap_or_else(|| panic!("{name} was accepted"))
            .to_string();
        writeln!(messages, "## {name}\n{}", error.replace(&path.display().to_string(), "video.safetensors")).unwrap();
    }
    insta::assert_snapshot!(messages);
}

/// Where text stands on both sides of the video, each side has tensors of its own, and `text` is no
/// name.
#[test]
fn text_on_both_sides() {
    let spec = spec("tiny_text_rope");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qkv.safetensors");
    let mut inputs = Inputs::random(&spec, 1, 2, 3);
    (inputs.before.lengths, inputs.after.lengths) = (Some(vec![5]), Some(vec![16]));
    let bits = |tokens: &Tokens| tokens.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tokens) in [("q", &inputs.q), ("k", &inputs.k), ("v", &inputs.v)] {
        tensors.push((name.into(), Dtype::BF16, vec![1, 573, 2, 128], bits(tokens)));
    }
    let tables = inputs.rope.as_ref().unwrap();
    for (name, table) in [("cos", &tables.cos), ("sin", &tables.sin)] {
        // The text after the video is rotated, and that before it is not.
        tensors.push((name.into(), Dtype::F32, vec![13 * 41 + 17, 48], bytes(table)));
    }
    let norms = [
        ("q_norm", Some(&inputs.q_norm)),
        ("k_norm", Some(&inputs.k_norm)),
        ("q_norm_before", inputs.before.q_norm.as_ref()),
        ("k_norm_before", inputs.before.k_norm.as_ref()),
        ("q_norm_after", inputs.after.q_norm.as_ref()),
        ("k_norm_after", inputs.after.k_norm.as_ref()),
    ];
    for (name, norm) in norms {
        let norm = norm.unwrap();
        tensors.push((format!("{name}.weight"), Dtype::F32, vec![256], bytes(norm.weight.as_ref().unwrap())));
        tensors.push((format!("{name}.bias"), Dtype::F32, vec![256], bytes(norm.bias.as_ref().unwrap())));
    }
    tensors.push(("before_lengths".into(), Dtype::U8, vec![1], vec![5]));
    tensors.push(("after_lengths".into(), Dtype::U8, vec![1], vec![16]));
    let load = |tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]| {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        load_inputs(&path, &spec)
    };
    assert_eq!(load(&tensors).unwrap(), inputs);
    // The rows of either side may be tensors of their own, here in f32 with heads first.
    let video = 13 * 41;
    for apart in [[true, false], [false, true], [true, true]] {
        let [before, after] = apart;
        let mut parted = tensors[3..].to_vec();
        let joined = if before { 23 } else { 0 }..if after { 23 + video } else { 573 };
        for (name, tokens) in [("q", &inputs.q), ("k", &inputs.k), ("v", &inputs.v)] {
            let part = |rows: std::ops::Range<usize>| bits(tokens)[rows.start * 512..rows.end * 512].to_vec();
            parted.push((name.into(), Dtype::BF16, vec![1, joined.len(), 2, 128], part(joined.clone())));
            if before {
                let heads = (0..2).flat_map(|head| (0..23).flat_map(move |row| tokens.row(0, row, head)));
                let floats: Vec<f32> = heads.map(|value| value as f32).collect();
                parted.push((format!("{name}_before"), Dtype::F32, vec![1, 2, 23, 128], bytes(&floats)));
            }
            if after {
                parted.push((format!("{name}_after"), Dtype::BF16, vec![1, 17, 256], part(23 + video..573)));
            }
        }
        let mut expected = inputs.clone();
        (expected.before.is_apart, expected.after.is_apart) = (before, after);
        assert_eq!(load(&parted).unwrap(), expected, "{apart:?}");
        let missing = parted.pop().unwrap().0;
        let error = load(&parted).unwrap_err().to_string();
        assert!(error.contains(&format!("tensor {missing}: found no such tensor")), "{error}");
    }
    let last = tensors.len() - 1;
    tensors[last].3 = vec![18];
    let error = load(&tensors).unwrap_err().to_string();
    assert!(error.contains("tensor after_lengths: found 18 at [0]") && error.contains("0 to 17"), "{error}");
    for name in ["text_lengths", "norm_added_q.weight"] {
        tensors[last].0 = name.into();
        let error = load(&tensors).unwrap_err().to_string();
        assert!(error.contains("a name that nobody reads") && error.contains("after_lengths"), "{error}");
    }
}

/// Names and texts of megabytes, and bytes that a terminal would obey, make short and plain
/// messages.
#[test]
fn messages_stay_small_and_plain() {
    let folder = tempfile::tempdir().unwrap();
    let escapes = "\u{1b}]0;title\u{7}\u{9b}31m";
    let path = folder.path().join(format!("{escapes}.safetensors"));
    let kernels = Kernels::for_spec(&Spec::shipped(SPEC).unwrap(), Arch::default()).unwrap();
    let long = "x".repeat(14 << 20);
    let mut errors = Vec::new();
    for name in [long.as_str(), escapes] {
        let view = TensorView::new(Dtype::U8, vec![1], &[0]).unwrap();
        std::fs::write(&path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
        errors.push(load_inputs(&path, &spec(SPEC)).unwrap_err());
        errors.push(load_frames(&path).err().unwrap());
        errors.push(framestride::Error::from(Spec::shipped(name).unwrap_err()));
        errors.push(framestride::Error::from(Spec::parse(name, &format!("name = '{name}'")).unwrap_err()));
        errors.push(Kernels::parse(name, kernels.ptx(), name).unwrap_err());
        errors.push(Kernels::from_file(name).unwrap_err());
    }
    errors.push(load_inputs(&folder.path().join(escapes), &spec(SPEC)).unwrap_err());
    for error in errors {
        let message = error.to_string();
        assert!(message.len() <= 2048, "{} bytes: {message:.200}", message.len());
        assert!(message.chars().all(|c| c == '\n' || !c.is_control()), "{message:?}");
    }
}
