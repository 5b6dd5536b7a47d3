//! Everything that can be wrong with a tensor file, a manifest or a call, each with its message.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use framestride::files::{load_frames, load_inputs};
use framestride::inputs::{Inputs, Tokens};
use framestride::run::run;
use framestride::shapes::launch::{NormWeights, Tensor};
use framestride::shapes::spec::{Dtype as Dtype16, Spec};
use framestride::{Device, HeadTypes, Kernels, Layer, Module, SparseAttention, Stream, Workspace, video};
use safetensors::tensor::{Dtype, TensorView};

/// 5 frames of 23 tokens and 24 of text, 2 heads of 64, bf16, rms norm, RoPE.
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
        ("too many heads", file(&["q", "k", "v"].map(|name| (name, Dtype::BF16, vec![1, 139, 3, 64])))),
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

/// A 16-bit or 32-bit type that cannot hold a finite number: tensor, element, number and limit.
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
    // The element [0, 2, 0, 3].
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

    // What rounds to the largest number is fine, and an infinity is one on purpose.
    let shape = vec![1, f16.layout.sequence() as usize, 1, 128];
    let mut values = vec![65519.0; shape.iter().product()];
    values[7] = f32::INFINITY;
    let inputs = with_last(&f16, ("v", Dtype::F32, shape), &bytes32(&values)).unwrap();
    assert_eq!((inputs.v.bits[6], inputs.v.bits[7]), (0x7bff, 0x7c00));
}

/// diffusers' names and shapes are the same inputs as those of this project.
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
    inputs.text_lengths = Some(vec![7, 24]);
    let bits = |tokens: &Tokens| tokens.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
    let heads_first = |tokens: &Tokens| -> Vec<u8> {
        let rows =
            (0..2).flat_map(|item| (0..2).flat_map(move |head| (0..139).map(move |row| tokens.index(item, row, head))));
        rows.flat_map(|index| tokens.bits[index..][..64].iter().flat_map(|bits| bits.to_le_bytes())).collect()
    };
    let tables = inputs.rope.clone().unwrap();
    assert_eq!(spec.rope.unwrap().pairs, framestride::shapes::spec::Pairs::Interleaved);
    let twice = |table: &[f32]| bytes(&table.iter().flat_map(|&value| [value, value]).collect::<Vec<f32>>());
    let norm = |norm: &Option<Vec<f32>>| bytes(norm.as_ref().unwrap());
    let text = |norm: &Option<framestride::inputs::Norm>| bytes(norm.as_ref().unwrap().weight.as_ref().unwrap());
    let theirs = [
        ("query", Dtype::BF16, vec![2, 2, 139, 64], heads_first(&inputs.q)),
        ("key", Dtype::BF16, vec![2, 139, 128], bits(&inputs.k)),
        ("value", Dtype::BF16, vec![2, 139, 2, 64], bits(&inputs.v)),
        ("freqs_cos", Dtype::F32, vec![115, 64], twice(&tables.cos)),
        ("freqs_sin", Dtype::F32, vec![1, 115, 1, 64], twice(&tables.sin)),
        ("transformer_blocks.0.attn.norm_q.weight", Dtype::F32, vec![64], norm(&inputs.q_norm.weight)),
        ("attn1.norm_k.weight", Dtype::F32, vec![64], norm(&inputs.k_norm.weight)),
        ("norm_added_q.weight", Dtype::F32, vec![64], text(&inputs.q_norm_text)),
        ("attn.norm_added_k.weight", Dtype::F32, vec![64], text(&inputs.k_norm_text)),
        ("text_lengths", Dtype::U64, vec![2, 1], [7u64, 24].iter().flat_map(|length| length.to_le_bytes()).collect()),
    ];
    assert_eq!(load(&theirs).unwrap(), inputs);

    // The other pairs of channels: then the two numbers of a pair differ.
    let halves = |table: &[f32]| bytes(&table.chunks(32).flat_map(|row| [row, row].concat()).collect::<Vec<f32>>());
    let mut other = theirs.clone();
    other[3].3 = halves(&tables.cos);
    let error = load(&other).unwrap_err().to_string();
    assert!(error.contains("tensor freqs_cos: found") && error.contains("rope.pairs = \"interleaved\""), "{error}");
    // Pairs of halves, as Cosmos has them.
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
    assert_eq!(load(&[&one[..], &[length]].concat()).unwrap().text_lengths, Some(vec![5]));
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

#[test]
fn manifests() {
    let kernels = Kernels::shipped(SPEC).unwrap();
    let json = kernels.manifest.to_json();
    let params = kernels.manifest.kernel("pack").unwrap().params_bytes;
    let cases = [
        ("other PTX", kernels.ptx.clone() + "\n", json.clone()),
        ("other architecture", kernels.ptx.clone(), json.replace("\"sm_90a\"", "\"sm_100a\"")),
        ("a kernel less", kernels.ptx.clone(), json.replace("\"entry\": \"select\"", "\"entry\": \"choose\"")),
        (
            "other parameters",
            kernels.ptx.clone(),
            json.replace(&format!("\"params_bytes\": {params}"), &format!("\"params_bytes\": {}", params + 8)),
        ),
        ("other frames", kernels.ptx.clone(), json.replace("\\nframes = ", "\\nframes = 1")),
        ("other launch table", kernels.ptx.clone(), json.replacen("\"min_blocks\": 1", "\"min_blocks\": 0", 1)),
        ("other format", kernels.ptx.clone(), json.replace("\"format\": 1", "\"format\": 2")),
        ("truncated", kernels.ptx.clone(), json.split("\"spec\"").next().unwrap_or_default().to_owned()),
    ];
    let mut messages = String::new();
    for (name, ptx, manifest) in cases {
        let error =
            Kernels::parse("model.json", &ptx, &manifest).err().unwrap_or_else(|| panic!("{name} was accepted"));
        // Digests and sizes change with the kernels.
        let message: Vec<String> = error
            .to_string()
            .split(' ')
            .map(|word| match word.len() {
                64 | 65 => "DIGEST".into(),
                _ if word == (params + 8).to_string() => "N".into(),
                _ if word == params.to_string() => "M".into(),
                _ => word.into(),
            })
            .collect();
        let message = message.join(" ");
        writeln!(messages, "## {name}\n{message}").unwrap();
    }
    // The fields are open: what was changed since it was read is not loaded.
    let mut changed = kernels.clone();
    changed.ptx += "\n";
    assert!(Module::load(&Device::emulator(), &changed).is_err());
    let mut changed = kernels.clone();
    changed.manifest.kernels[0].min_blocks += 1;
    assert!(Module::load(&Device::emulator(), &changed).is_err());
    let unknown = Kernels::shipped("no_such_model").unwrap_err().to_string();
    assert!(unknown.starts_with("spec name: found \"no_such_model\"\n = allowed: one of "), "{unknown}");
    insta::assert_snapshot!(messages);
}

/// Address and bytes of a workspace.
struct Place {
    address: u64,
    bytes: u64,
}

/// A call that would be right, but for what `change` does to it.
fn call(module: &Arc<Module>, change: impl FnOnce(&mut Layer, &mut HeadTypes, &mut Place)) -> framestride::Result<()> {
    let attention = SparseAttention::new(module, 1, 2)?;
    // No memory behind these addresses: they are only looked at.
    let tensor = |data| Tensor { data, batch: 139 * 128, row: 128, head: 64 };
    let mut layer = Layer {
        q: tensor(0x10_0000),
        k: tensor(0x20_0000),
        v: tensor(0x30_0000),
        out: tensor(0x40_0000),
        cos: 0x50_0000,
        sin: 0x60_0000,
        text_lengths: 0x70_0000,
        lse: 0x80_0000,
        ..Layer::default()
    };
    let mut types = HeadTypes::Profiled;
    let mut place = Place { address: 0x100_0000, bytes: attention.workspace_bytes() };
    change(&mut layer, &mut types, &mut place);
    // SAFETY: the emulator has no memory at any of these addresses and says so instead of touching it; calls that are
    // refused launch nothing.
    unsafe {
        let workspace = Workspace::borrow(module.device(), place.address, place.bytes);
        attention.forward(Stream::DEFAULT, &layer, types, &workspace)
    }
}

type Change = fn(&mut Layer, &mut HeadTypes, &mut Place);

#[test]
fn calls() {
    let module = Module::load(&Device::emulator(), &Kernels::shipped(SPEC).unwrap()).unwrap();
    let cases: [(&str, Change); 36] = [
        ("null q", |layer, _, _| layer.q.data = 0),
        ("odd address", |layer, _, _| layer.k.data += 1),
        ("strides in bytes that overflow", |layer, _, _| layer.v.row = u64::MAX / 2),
        ("q that ends beyond 2^64", |layer, _, _| layer.q.data = u64::MAX - 1),
        ("null out", |layer, _, _| layer.out.data = 0),
        ("out rows overlap", |layer, _, _| layer.out.row = 64),
        ("out heads overlap", |layer, _, _| layer.out.head = 32),
        ("out broadcast over heads", |layer, _, _| layer.out.head = 0),
        ("no cosines", |layer, _, _| layer.cos = 0),
        ("unaligned sines", |layer, _, _| layer.sin += 4),
        ("cosines that end beyond 2^64", |layer, _, _| layer.cos = u64::MAX - 15),
        ("unaligned weight", |layer, _, _| layer.q_norm = NormWeights { weight: 0x90_0008, bias: 0 }),
        ("bias of an rms norm", |layer, _, _| layer.k_norm_text = Some(NormWeights { weight: 0, bias: 0x90_0000 })),
        ("unaligned lengths", |layer, _, _| layer.text_lengths += 2),
        ("lengths that end beyond 2^64", |layer, _, _| layer.text_lengths = u64::MAX - 3),
        ("unaligned lse", |layer, _, _| layer.lse += 2),
        ("lse over out", |layer, _, _| layer.lse = layer.out.data + 64),
        ("lse over q", |layer, _, _| layer.lse = layer.q.data + 64),
        ("lse over cosines", |layer, _, _| layer.lse = layer.cos + 64),
        ("out over lengths", |layer, _, _| layer.text_lengths = layer.out.data),
        ("out over head types", |layer, types, _| *types = HeadTypes::Given(layer.out.data)),
        ("out over sines", |layer, _, _| layer.sin = layer.out.data + 64),
        ("out over a weight", |layer, _, _| layer.k_norm.weight = layer.out.data + 64),
        ("null head types", |_, types, _| *types = HeadTypes::Given(0)),
        ("head types in the workspace", |_, types, place| *types = HeadTypes::Given(place.address + 512)),
        ("out in the workspace", |layer, _, place| layer.out.data = place.address),
        ("q in the workspace", |layer, _, place| layer.q.data = place.address + 1024),
        ("lse in the workspace", |layer, _, place| layer.lse = place.address + 1024),
        ("cosines in the workspace", |layer, _, place| layer.cos = place.address + 1024),
        ("a weight in the workspace", |layer, _, place| layer.q_norm.weight = place.address + 1024),
        ("a text weight in the workspace", |layer, _, place| {
            layer.k_norm_text = Some(NormWeights { weight: place.address + 1024, bias: 0 })
        }),
        ("lengths in the workspace", |layer, _, place| layer.text_lengths = place.address + 1024),
        ("small workspace", |_, _, place| place.bytes = 1024),
        ("unaligned workspace", |_, _, place| place.address += 16),
        ("workspace that ends beyond 2^64", |_, _, place| place.address = u64::MAX - 255),
        ("scale not a number", |layer, _, _| layer.scale = Some(f32::NAN)),
    ];
    let needed = SparseAttention::new(&module, 1, 2).unwrap().workspace_bytes();
    let mut messages = String::new();
    for (name, change) in cases {
        let error = call(&module, change).err().unwrap_or_else(|| panic!("{name} was accepted")).to_string();
        let error = error.replace(&needed.to_string(), "N").replace(&format!("{:#x}", 0x100_0000 + needed), "END");
        writeln!(messages, "## {name}\n{error}").unwrap();
    }
    for (batch, heads) in [(0, 2), (1, 0), (1, 3), (70000, 1)] {
        let error = SparseAttention::new(&module, batch, heads).err().unwrap();
        writeln!(messages, "## batch {batch}, {heads} heads\n{error}").unwrap();
    }
    let all = Module::load(&Device::emulator(), &Kernels::shipped("tiny_heads_sinks").unwrap()).unwrap();
    let error = SparseAttention::new(&all, 2, 2).err().unwrap();
    writeln!(messages, "## some heads of a norm over heads\n{error}").unwrap();
    insta::assert_snapshot!(messages);

    // What is right is launched, and only then does the emulator find that there is no memory.
    let launched = call(&module, |_, _, _| ()).unwrap_err();
    assert!(matches!(launched, framestride::Error::Emulator(_)), "{launched}");
    let in_place = call(&module, |layer, _, _| layer.out = layer.q).unwrap_err();
    assert!(matches!(in_place, framestride::Error::Emulator(_)), "q's own memory may be the output: {in_place}");
    let weighted = call(&module, |layer, _, _| layer.q_norm.weight = 0x90_0000).unwrap_err();
    assert!(matches!(weighted, framestride::Error::Emulator(_)), "{weighted}");
}

/// Scales with which a row of root mean square 1 stays finite, and no others: f32's largest number is 2^128, bf16's nearly, f16's 2^16.
#[test]
fn scales() {
    let finite = |module: &Arc<Module>, scale: f32| {
        let error = call(module, |layer, _, _| layer.scale = Some(scale)).unwrap_err().to_string();
        !error.starts_with(&format!("scale: found {scale:e}"))
    };
    let module = |name: &str| Module::load(&Device::emulator(), &Kernels::shipped(name).unwrap()).unwrap();
    let (bf16, f16) = (module(SPEC), module("tiny_layer_half"));
    assert_eq!((bf16.spec().dtype, bf16.spec().head_dim), (Dtype16::Bf16, 64));
    assert_eq!((f16.spec().dtype, f16.spec().head_dim), (Dtype16::F16, 128));
    for scale in [3e38, f32::MAX, f32::INFINITY, 0.0, -0.125, 1e-40, 3.8e36] {
        assert!(!finite(&bf16, scale), "{scale:e}");
    }
    // 65504 / sqrt(128) / log2(e) is 4013.2.
    assert!(finite(&f16, 4013.0) && !finite(&f16, 4014.0));
    // 2^128 / 64 / log2(e) is 3.685e36.
    for scale in [3.6e36, 1.0, 0.125, 1e-20, f32::MIN_POSITIVE] {
        assert!(finite(&bf16, scale), "{scale:e}");
    }
}

/// Every device's memory is its own, and a workspace is read within its bytes.
#[test]
fn memory_of_others() {
    let (device, other) = (Device::emulator(), Device::emulator());
    let (mine, theirs) = (device.upload(&[7; 512]).unwrap(), other.upload(&[9; 512]).unwrap());
    assert_eq!(mine.address(), theirs.address(), "addresses tell nothing");
    let mut messages = String::new();
    let mut refused = |what: &str, result: framestride::Result<()>| {
        writeln!(messages, "## {what}\n{}", result.err().unwrap_or_else(|| panic!("{what} was accepted"))).unwrap();
    };
    refused("read", device.read(&theirs, 0, 4).map(drop));
    refused("write", device.write(&theirs, 0, &[1; 4]));
    refused("fill", device.fill(&theirs, 1));
    refused("read behind the end", device.read(&mine, 509, 4).map(drop));
    refused("read that overflows", device.read(&mine, u64::MAX, 4).map(drop));
    refused("write behind the end", device.write(&mine, 512, &[1]));
    assert_eq!(
        (device.read(&mine, 0, 512).unwrap(), other.read(&theirs, 0, 512).unwrap()),
        (vec![7; 512], vec![9; 512])
    );
    assert_eq!(device.clone().read(&mine, 508, 4).unwrap(), [7; 4]);

    let attention =
        SparseAttention::new(&Module::load(&device, &Kernels::shipped(SPEC).unwrap()).unwrap(), 1, 2).unwrap();
    let bytes = attention.workspace_bytes();
    let mut read = |what: &str, device: &Device, address: u64, bytes: u64| {
        // SAFETY: the emulator has its own memory alone, and says where there is none.
        let workspace = unsafe { Workspace::borrow(device, address, bytes) };
        refused(what, attention.read_profile(&workspace).map(drop));
    };
    read("a workspace of no bytes", &device, mine.address(), 0);
    read("a workspace that ends beyond 2^64", &device, u64::MAX - 255, bytes);
    read("a workspace of another device", &other, theirs.address(), bytes);
    read("a workspace at 0", &device, 0, bytes);
    refused(
        "another device's own workspace",
        attention.read_profile(&Workspace::allocate(&other, bytes).unwrap()).map(drop),
    );
    insta::assert_snapshot!(messages.replace(&bytes.to_string(), "N"));
    assert_eq!(attention.read_profile(&Workspace::allocate(&device, bytes).unwrap()).unwrap().len(), 2);
}

/// More than there is: an error, and the process lives.
#[test]
fn more_memory_than_there_is() {
    let device = Device::emulator();
    for bytes in [1 << 39, 1 << 46, u64::MAX] {
        let error = device.allocate(bytes).err().unwrap_or_else(|| panic!("{bytes} bytes were granted"));
        assert!(matches!(error, framestride::Error::Input { .. }), "{error}");
        assert!(error.to_string().starts_with("device memory: found"), "{error}");
    }
    device.allocate(1 << 20).unwrap();
}

/// Inputs made by hand whose parts do not fit each other.
#[test]
fn inputs_that_contradict_themselves() {
    let module = Module::load(&Device::emulator(), &Kernels::shipped(SPEC).unwrap()).unwrap();
    let right = Inputs::random(module.spec(), 1, 2, 1);
    type Change = fn(&mut Inputs);
    let changes: [(&str, Change); 5] = [
        ("fewer bits than the shape says", |inputs| inputs.q.bits.truncate(100)),
        ("more bits than the shape says", |inputs| inputs.v.bits.push(0)),
        ("another type", |inputs| inputs.k.dtype = Dtype16::F16),
        ("a shape that overflows", |inputs| {
            (inputs.q.batch, inputs.k.batch, inputs.v.batch) = (1 << 60, 1 << 60, 1 << 60)
        }),
        ("a scale that overflows", |inputs| inputs.scale = Some(3e38)),
    ];
    let mut messages = String::new();
    for (name, change) in changes {
        let mut inputs = right.clone();
        change(&mut inputs);
        let error = run(&module, &inputs, &[], &|_, _| ()).err().unwrap_or_else(|| panic!("{name} was accepted"));
        writeln!(messages, "## {name}\n{error}").unwrap();
    }
    insta::assert_snapshot!(messages);
}

/// Names and texts of megabytes, and bytes that a terminal would obey.
#[test]
fn messages_stay_small_and_plain() {
    let folder = tempfile::tempdir().unwrap();
    let escapes = "\u{1b}]0;title\u{7}\u{9b}31m";
    let path = folder.path().join(format!("{escapes}.safetensors"));
    let kernels = Kernels::shipped(SPEC).unwrap();
    let long = "x".repeat(14 << 20);
    let mut errors = Vec::new();
    for name in [long.as_str(), escapes] {
        let view = TensorView::new(Dtype::U8, vec![1], &[0]).unwrap();
        std::fs::write(&path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
        errors.push(load_inputs(&path, &spec(SPEC)).unwrap_err());
        errors.push(load_frames(&path).err().unwrap());
        errors.push(Kernels::shipped(name).unwrap_err());
        errors.push(Kernels::for_spec(name, &format!("name = '{name}'")).unwrap_err());
        errors.push(Kernels::parse(name, &kernels.ptx, name).unwrap_err());
        errors.push(Kernels::from_file(name).unwrap_err());
    }
    errors.push(load_inputs(&folder.path().join(escapes), &spec(SPEC)).unwrap_err());
    for error in errors {
        let message = error.to_string();
        assert!(message.len() <= 2048, "{} bytes: {message:.200}", message.len());
        assert!(message.chars().all(|c| c == '\n' || !c.is_control()), "{message:?}");
    }
}
