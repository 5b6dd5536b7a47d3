//! Everything that can be wrong with a manifest or a call, each with its message.
#![cfg(all(feature = "emulator", feature = "templates"))]

use std::fmt::Write;
use std::io::Read;
use std::sync::Arc;

use flate2::read::GzDecoder;
use framestride::shapes::arch::Arch;
use framestride::shapes::layout::Divisor;
use framestride::shapes::params::{NormWeights, Tensor};
use framestride::shapes::spec::{Compute, Dtype, Spec};
use framestride::{Device, HeadTypes, Kernels, Layer, Module, SparseAttention, Stream, Text, Workspace};

/// A spec of 5 frames of 23 tokens, 24 text tokens, 2 heads of 64, bf16, rms norm and RoPE.
const SPEC: &str = "tiny_text_last";

#[test]
fn manifests() {
    let kernels = Kernels::for_spec(&Spec::shipped(SPEC).unwrap(), Arch::default()).unwrap();
    let json = kernels.manifest().to_json();
    let params = kernels.manifest().kernel("pack").unwrap().params_bytes;
    let cases = [
        ("other PTX", format!("{}\n", kernels.ptx()), json.clone()),
        ("other architecture", kernels.ptx().to_owned(), json.replace("\"sm_90a\"", "\"sm_100a\"")),
        ("a kernel less", kernels.ptx().to_owned(), json.replace("\"entry\": \"select\"", "\"entry\": \"choose\"")),
        (
            "other parameters",
            kernels.ptx().to_owned(),
            json.replace(&format!("\"params_bytes\": {params}"), &format!("\"params_bytes\": {}", params + 8)),
        ),
        ("other frames", kernels.ptx().to_owned(), json.replace("\\nframes = ", "\\nframes = 1")),
        ("other launch table", kernels.ptx().to_owned(), json.replacen("\"min_blocks\": 1", "\"min_blocks\": 0", 1)),
        ("other format", kernels.ptx().to_owned(), json.replace("\"format\": 3", "\"format\": 2")),
        ("truncated", kernels.ptx().to_owned(), json.split("\"spec\"").next().unwrap_or_default().to_owned()),
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
    let mut template = String::new();
    let compressed = &include_bytes!("../kernels/sm_90a_bf16_64.ptx.gz")[..];
    GzDecoder::new(compressed).read_to_string(&mut template).unwrap();
    let error = Kernels::parse("template.json", &template, include_str!("../kernels/sm_90a_bf16_64.json")).unwrap_err();
    assert!(error.to_string().starts_with("template.json, spec: found none"), "{error}");
    let mut changed = kernels.manifest().clone();
    changed.kernels[0].min_blocks += 1;
    assert!(Kernels::parse("changed.json", kernels.ptx(), &changed.to_json()).is_err());
    let unknown = Spec::shipped("tiny_plan").unwrap_err().to_string();
    assert!(
        unknown.contains("no shipped spec has this name") && unknown.contains("did you mean tiny_plain?"),
        "{unknown}"
    );
    insta::assert_snapshot!(messages);
}

/// A spec whose fields were changed after it was read is refused, whatever they say now.
#[test]
fn changed_specs() {
    let spec = Spec::shipped(SPEC).unwrap();
    let changes: [fn(&mut Spec); 12] = [
        |spec| spec.name.push('2'),
        |spec| spec.heads = 0,
        |spec| spec.heads = u32::MAX,
        |spec| spec.batch = u32::MAX,
        |spec| spec.head_dim = 0,
        |spec| spec.head_dim = u32::MAX,
        |spec| spec.profile.rows = 0,
        |spec| spec.profile.rows = u32::MAX,
        |spec| spec.layout.frames = Divisor::new(u32::MAX),
        |spec| spec.layout.tokens_per_frame.value = 0,
        |spec| spec.layout.sink_frames = u32::MAX,
        |spec| spec.source.text.clear(),
    ];
    for (index, change) in changes.into_iter().enumerate() {
        let mut changed = spec.clone();
        change(&mut changed);
        assert!(Kernels::for_spec(&changed, Arch::default()).is_err(), "change {index} was accepted");
    }
}

/// The address and the bytes of a borrowed workspace.
struct Borrowed {
    address: u64,
    bytes: u64,
}

/// Makes a call of one item and two heads that would be right without what `change` does to it.
fn call(
    module: &Arc<Module>,
    change: impl FnOnce(&mut Layer, &mut HeadTypes, &mut Borrowed),
) -> framestride::Result<()> {
    call_of(module, [1, 2], change)
}

/// Likewise, of a batch and a number of heads.
fn call_of(
    module: &Arc<Module>,
    [batch, heads]: [u32; 2],
    change: impl FnOnce(&mut Layer, &mut HeadTypes, &mut Borrowed),
) -> framestride::Result<()> {
    let attention = SparseAttention::new(module, batch, heads)?;
    // There is no memory at these addresses. They are only looked at.
    let tensor = |data| Tensor { data, batch: 139 * 128, row: 128, head: 64 };
    let mut layer = Layer {
        q: tensor(0x10_0000),
        k: tensor(0x20_0000),
        v: tensor(0x30_0000),
        out: tensor(0x40_0000),
        cos: 0x50_0000,
        sin: 0x60_0000,
        after: Text { lengths: 0x70_0000, ..Text::default() },
        lse: 0x80_0000,
        ..Layer::default()
    };
    let mut types = HeadTypes::Profiled;
    let mut borrowed = Borrowed { address: 0x100_0000, bytes: attention.workspace_bytes() };
    change(&mut layer, &mut types, &mut borrowed);
    // SAFETY: the emulator has no memory at any of these addresses, and says so instead of touching
    // it. Calls that are refused launch nothing.
    unsafe {
        let workspace = Workspace::borrow(module.device(), borrowed.address, borrowed.bytes);
        attention.forward(Stream::DEFAULT, &layer, types, &workspace)
    }
}

/// Q, K and V of text as tensors of their own, from an address on.
fn text_apart(data: u64) -> [Tensor; 3] {
    [0, 1, 2].map(|part| Tensor { data: data.wrapping_add(part << 20), batch: 19 * 128, row: 128, head: 64 })
}

type Change = fn(&mut Layer, &mut HeadTypes, &mut Borrowed);

#[test]
fn calls() {
    let module = Module::load(&Device::emulator(), &Spec::shipped(SPEC).unwrap()).unwrap();
    let cases: [(&str, Change); 48] = [
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
        ("bias of an rms norm", |layer, _, _| layer.after.k_norm = Some(NormWeights { weight: 0, bias: 0x90_0000 })),
        ("unaligned lengths", |layer, _, _| layer.after.lengths += 2),
        ("lengths that end beyond 2^64", |layer, _, _| layer.after.lengths = u64::MAX - 3),
        ("unaligned lse", |layer, _, _| layer.lse += 2),
        ("lse over out", |layer, _, _| layer.lse = layer.out.data + 64),
        ("lse over q", |layer, _, _| layer.lse = layer.q.data + 64),
        ("lse over cosines", |layer, _, _| layer.lse = layer.cos + 64),
        ("out over lengths", |layer, _, _| layer.after.lengths = layer.out.data),
        ("out over head types", |layer, types, _| *types = HeadTypes::Given(layer.out.data)),
        ("out over sines", |layer, _, _| layer.sin = layer.out.data + 64),
        ("out over a weight", |layer, _, _| layer.k_norm.weight = layer.out.data + 64),
        ("null head types", |_, types, _| *types = HeadTypes::Given(0)),
        ("head types in the workspace", |_, types, borrowed| *types = HeadTypes::Given(borrowed.address + 512)),
        ("out in the workspace", |layer, _, borrowed| layer.out.data = borrowed.address),
        ("q in the workspace", |layer, _, borrowed| layer.q.data = borrowed.address + 1024),
        ("lse in the workspace", |layer, _, borrowed| layer.lse = borrowed.address + 1024),
        ("cosines in the workspace", |layer, _, borrowed| layer.cos = borrowed.address + 1024),
        ("a weight in the workspace", |layer, _, borrowed| layer.q_norm.weight = borrowed.address + 1024),
        ("a text weight in the workspace", |layer, _, borrowed| {
            layer.after.k_norm = Some(NormWeights { weight: borrowed.address + 1024, bias: 0 })
        }),
        ("out over lengths of the other side", |layer, _, _| layer.before.lengths = layer.out.data + 64),
        ("a bias of the other side", |layer, _, _| {
            layer.before.q_norm = Some(NormWeights { weight: 0, bias: 0x90_0000 })
        }),
        ("lengths in the workspace", |layer, _, borrowed| layer.after.lengths = borrowed.address + 1024),
        ("small workspace", |_, _, borrowed| borrowed.bytes = 1024),
        ("unaligned workspace", |_, _, borrowed| borrowed.address += 16),
        ("workspace that ends beyond 2^64", |_, _, borrowed| borrowed.address = u64::MAX - 255),
        ("unaligned found errors", |layer, _, _| layer.found.errors = 0x90_0002),
        ("found types over q", |layer, _, _| layer.found.head_types = layer.q.data + 64),
        ("found errors over lse", |layer, _, _| layer.found.errors = layer.lse + 64),
        ("found types of a dense call", |layer, types, _| {
            (*types, layer.found.head_types) = (HeadTypes::Dense, 0x90_0000);
        }),
        ("found errors over the given types", |layer, types, _| {
            (*types, layer.found.errors) = (HeadTypes::Given(0x90_0000), 0x90_0000);
        }),
        ("scale not a number", |layer, _, _| layer.scale = Some(f32::NAN)),
        ("tensors of text that the spec has not", |layer, _, _| layer.before.qkv = Some(text_apart(0xa0_0000))),
        ("a null tensor of the text", |layer, _, _| {
            layer.after.qkv = Some([text_apart(0xa0_0000)[0], Tensor::default(), text_apart(0xc0_0000)[2]])
        }),
        ("an odd address of the text", |layer, _, _| layer.after.qkv = Some(text_apart(0xa0_0001))),
        ("text that ends beyond 2^64", |layer, _, _| layer.after.qkv = Some(text_apart(u64::MAX - 1))),
        ("text in the workspace", |layer, _, borrowed| layer.after.qkv = Some(text_apart(borrowed.address + 1024))),
    ];
    let needed = SparseAttention::new(&module, 1, 2).unwrap().workspace_bytes();
    let mut messages = String::new();
    for (name, change) in cases {
        let error = call(&module, change).err().unwrap_or_else(|| panic!("{name} was accepted")).to_string();
        let error = error.replace(&needed.to_string(), "N").replace(&format!("{:#x}", 0x100_0000 + needed), "END");
        writeln!(messages, "## {name}\n{error}").unwrap();
    }
    for (batch, heads) in [(0, 2), (1, 0), (1, 70000), (70000, 1), (22000, 3)] {
        let error = SparseAttention::new(&module, batch, heads).err().unwrap();
        writeln!(messages, "## batch {batch}, {heads} heads\n{error}").unwrap();
    }
    let all = Module::load(&Device::emulator(), &Spec::shipped("tiny_heads_sinks").unwrap()).unwrap();
    for (name, heads) in [("some", 2), ("more", 4), ("no", 0)] {
        let error = SparseAttention::new(&all, 2, heads).err().unwrap();
        writeln!(messages, "## {name} heads of a norm over heads\n{error}").unwrap();
    }
    insta::assert_snapshot!(messages);

    // A call that is right is launched. Only then does the emulator find that there is no memory.
    let launched = call(&module, |_, _, _| ()).unwrap_err();
    assert!(matches!(launched, framestride::Error::Emulator(_)), "{launched}");
    let in_place = call(&module, |layer, _, _| layer.out = layer.q).unwrap_err();
    assert!(matches!(in_place, framestride::Error::Emulator(_)), "q's own memory may be the output: {in_place}");
    let weighted = call(&module, |layer, _, _| layer.q_norm.weight = 0x90_0000).unwrap_err();
    assert!(matches!(weighted, framestride::Error::Emulator(_)), "{weighted}");
}

/// Tables of batch items lie apart by a stride, and all of them count as memory that is read.
#[test]
fn tables_of_batch_items() {
    let refused = |name: &str, extent: [u32; 2], change: fn(&mut Layer)| {
        let module = Module::load(&Device::emulator(), &Spec::shipped(name).unwrap()).unwrap();
        call_of(&module, extent, |layer, _, _| change(layer)).unwrap_err().to_string()
    };
    let messages = [
        refused(SPEC, [2, 2], |layer| layer.rope_batch = 115 * 32 + 2),
        refused(SPEC, [2, 2], |layer| layer.rope_batch = u64::MAX - 3),
        refused(SPEC, [3, 2], |layer| layer.rope_batch = 1 << 60),
        refused(SPEC, [2, 2], |layer| {
            layer.rope_batch = 0x10_0000;
            layer.lse = layer.cos + 4 * layer.rope_batch + 64;
        }),
        refused("tiny_plain", [1, 1], |layer| (layer.cos, layer.sin, layer.rope_batch) = (0, 0, 64)),
    ];
    insta::assert_snapshot!(messages.join("\n\n"));

    // Tables of two items may be parts of one.
    let module = Module::load(&Device::emulator(), &Spec::shipped(SPEC).unwrap()).unwrap();
    let launched = call_of(&module, [2, 2], |layer, _, _| layer.rope_batch = 32).unwrap_err();
    assert!(matches!(launched, framestride::Error::Emulator(_)), "{launched}");
}

/// Scales are accepted with which a row of root mean square 1 stays finite, and no others. Numbers
/// end at about 2^128 in f32 and bf16, and at 2^16 in f16.
#[test]
fn scales() {
    let finite = |module: &Arc<Module>, scale: f32| {
        let error = call(module, |layer, _, _| layer.scale = Some(scale)).unwrap_err().to_string();
        !error.starts_with(&format!("scale: found {scale:e}"))
    };
    let module = |name: &str| Module::load(&Device::emulator(), &Spec::shipped(name).unwrap()).unwrap();
    let (bf16, f16) = (module(SPEC), module("tiny_layer_half"));
    assert_eq!((bf16.spec().dtype, bf16.spec().head_dim), (Dtype::Bf16, 64));
    assert_eq!((f16.spec().dtype, f16.spec().head_dim), (Dtype::F16, 128));
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
    refused("fill", device.fill(Stream::DEFAULT, &theirs, 1));
    refused("read behind the end", device.read(&mine, 509, 4).map(drop));
    refused("read that overflows", device.read(&mine, u64::MAX, 4).map(drop));
    refused("write behind the end", device.write(&mine, 512, &[1]));
    assert_eq!(
        (device.read(&mine, 0, 512).unwrap(), other.read(&theirs, 0, 512).unwrap()),
        (vec![7; 512], vec![9; 512])
    );
    assert_eq!(device.clone().read(&mine, 508, 4).unwrap(), [7; 4]);

    let attention = SparseAttention::new(&Module::load(&device, &Spec::shipped(SPEC).unwrap()).unwrap(), 1, 2).unwrap();
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

/// Precisions are for a spec with a bound, and Q, K and V are read when a part of the output is written.
#[test]
fn precisions() {
    let bound = Spec::shipped("tiny_e4m3").unwrap();
    let device = Device::emulator();
    let with = |compute, largest_error: Option<f64>| {
        let spec = bound.to_builder().compute(compute).largest_error(largest_error).build().unwrap();
        Module::load(&device, &spec).unwrap()
    };
    let eight = with(Compute::E4m3, None);
    let sixteen = with(Compute::Dtype, None);
    let both = with(Compute::E4m3, Some(0.05));
    let mut messages = String::new();
    let mut refused = |what: &str, module: &Arc<Module>, change: Change| {
        let made: Change = |layer, _, _| {
            let tensor = |data| Tensor { data, batch: 437 * 256, row: 256, head: 128 };
            (layer.q, layer.k, layer.v) = (tensor(0x10_0000), tensor(0x20_0000), tensor(0x30_0000));
            (layer.out, layer.after.lengths, layer.lse) = (tensor(0x40_0000), 0, 0);
        };
        let result = call(module, |layer, types, workspace| {
            made(layer, types, workspace);
            change(layer, types, workspace);
        });
        writeln!(messages, "## {what}\n{}", result.err().unwrap_or_else(|| panic!("{what} was accepted"))).unwrap();
    };
    refused("precisions without 8 bits", &sixteen, |layer, _, _| layer.precisions = 0x90_0000);
    refused("precisions without a bound", &eight, |layer, _, _| layer.precisions = 0x90_0000);
    refused("unaligned precisions", &both, |layer, _, _| layer.precisions = 0x90_0002);
    refused("out over precisions", &both, |layer, _, _| layer.precisions = layer.out.data);
    refused("precisions in the workspace", &both, |layer, _, workspace| layer.precisions = workspace.address);
    refused("found precisions without a bound", &eight, |layer, _, _| layer.found.precisions = 0x90_0000);
    refused("found precisions of dense heads", &both, |layer, types, _| {
        layer.found.precisions = 0x90_0000;
        *types = HeadTypes::Dense;
    });
    refused("found errors of given precisions", &both, |layer, _, _| {
        (layer.precisions, layer.found.precision_errors) = (0x90_0000, 0x91_0000);
    });
    refused("out over q, where precisions are found", &both, |layer, _, _| layer.out = layer.q);
    refused("out over v, where precisions are given", &both, |layer, types, _| {
        (layer.precisions, layer.out) = (0x90_0000, layer.v);
        *types = HeadTypes::Dense;
    });
    insta::assert_snapshot!(messages);
}

/// Asking for more memory than there is gives an error, and the process lives.
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
