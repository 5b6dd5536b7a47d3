//! Everything that can be wrong with a tensor file, a manifest or a call, each with its message.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use framestride::files::{load_frames, load_inputs};
use framestride::shapes::launch::{NormWeights, Tensor};
use framestride::shapes::spec::Spec;
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
        ("heads before tokens", with(&[("q", Dtype::BF16, vec![1, 2, 139, 64])])),
        ("another head dim", with(&[("v", Dtype::F32, vec![1, 139, 2, 128])])),
        ("another batch", with(&[("k", Dtype::BF16, vec![2, 139, 2, 64])])),
        ("no batch", file(&["q", "k", "v"].map(|name| (name, Dtype::BF16, vec![0, 139, 2, 64])))),
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
    let unknown = Kernels::shipped("no_such_model").unwrap_err().to_string();
    assert!(unknown.starts_with("spec name: found \"no_such_model\"\n = allowed: one of "), "{unknown}");
    insta::assert_snapshot!(messages);
}

/// A call that would be right, but for what `change` does to it.
fn call(
    module: &Arc<Module>,
    change: impl FnOnce(&mut Layer, &mut HeadTypes, &mut Workspace),
) -> framestride::Result<()> {
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
    let mut workspace = Workspace::borrow(0x100_0000, attention.workspace_bytes());
    change(&mut layer, &mut types, &mut workspace);
    // SAFETY: the emulator has no memory at any of these addresses and says so instead of touching it; calls that are
    // refused launch nothing.
    unsafe { attention.forward(Stream::DEFAULT, &layer, types, &workspace) }
}

type Change = fn(&mut Layer, &mut HeadTypes, &mut Workspace);

#[test]
fn calls() {
    let module = Module::load(&Device::emulator(), &Kernels::shipped(SPEC).unwrap()).unwrap();
    let cases: [(&str, Change); 22] = [
        ("null q", |layer, _, _| layer.q.data = 0),
        ("odd address", |layer, _, _| layer.k.data += 1),
        ("strides in bytes that overflow", |layer, _, _| layer.v.row = u64::MAX / 2),
        ("null out", |layer, _, _| layer.out.data = 0),
        ("out rows overlap", |layer, _, _| layer.out.row = 64),
        ("out heads overlap", |layer, _, _| layer.out.head = 32),
        ("out broadcast over heads", |layer, _, _| layer.out.head = 0),
        ("no cosines", |layer, _, _| layer.cos = 0),
        ("unaligned sines", |layer, _, _| layer.sin += 4),
        ("unaligned weight", |layer, _, _| layer.q_norm = NormWeights { weight: 0x90_0008, bias: 0 }),
        ("bias of an rms norm", |layer, _, _| layer.k_norm_text = Some(NormWeights { weight: 0, bias: 0x90_0000 })),
        ("unaligned lengths", |layer, _, _| layer.text_lengths += 2),
        ("unaligned lse", |layer, _, _| layer.lse += 2),
        ("lse over out", |layer, _, _| layer.lse = layer.out.data + 64),
        ("out over lengths", |layer, _, _| layer.text_lengths = layer.out.data),
        ("out over head types", |layer, types, _| *types = HeadTypes::Given(layer.out.data)),
        ("null head types", |_, types, _| *types = HeadTypes::Given(0)),
        ("out in the workspace", |layer, _, workspace| layer.out.data = workspace.address()),
        ("q in the workspace", |layer, _, workspace| layer.q.data = workspace.address() + 1024),
        ("small workspace", |_, _, workspace| *workspace = Workspace::borrow(workspace.address(), 1024)),
        ("unaligned workspace", |_, _, workspace| *workspace = Workspace::borrow(0x100_0010, 1 << 30)),
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
}
