//! Programs in C and C++ that link the library: the examples, and those of `c/`, which do wrong.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{compile, folder, run, succeeds, tool};
use framestride::device::{Buffer, Gpu};
use framestride::shapes::params::{NormWeights, Tensor};
use framestride::shapes::spec::{NormKind, NormOver, Pairs, QkNorm, Rope, Width};
use framestride::{Device, Found, HeadTypes, Layer, Module, SparseAttention, Spec, Stream, Text, Workspace};

/// What valgrind must not find: accesses beyond memory, uses of values that nobody set, lost memory.
fn valgrind() -> Command {
    let mut valgrind = tool("valgrind");
    valgrind.args(["-q", "--error-exitcode=99", "--leak-check=full", "--errors-for-leak-kinds=definite"]);
    valgrind.arg("--show-leak-kinds=definite");
    valgrind
}

#[test]
fn an_example_in_c_gives_what_the_rust_library_gives() {
    let program = compile("examples/one_layer.c", &["-lm"]);
    for (name, device) in devices() {
        let file = folder().join(format!("one_layer_{name}.bin"));
        let said = succeeds(run(&program).args([name, file.to_str().unwrap()]));
        assert!(said.contains("three rows agree"), "{said}");
        compare_with_rust(&device, &fs::read(file).unwrap());
    }
}

#[test]
fn an_example_in_cpp_runs_with_the_shared_and_the_static_library() {
    let shared = compile("examples/two_calls.cpp", &[]);
    let linked_statically = compile("examples/two_calls.cpp", &["-static-library"]);
    for (name, _) in devices() {
        for program in [&shared, &linked_statically] {
            let said = succeeds(run(program).arg(name));
            assert!(said.contains("every 17th row agrees"), "{said}");
        }
    }
    let libraries = succeeds(tool("ldd").arg(linked_statically));
    assert!(!libraries.contains("framestride"), "{libraries}");
    succeeds(valgrind().arg(shared).arg("emulator"));
}

#[test]
fn misuse() {
    let program = compile("tests/c/misuse.c", &[]);
    fs::write(folder().join("no.ptx"), "no").unwrap();
    fs::write(folder().join("no.json"), "no").unwrap();
    insta::assert_snapshot!(succeeds(run(&program).arg("no.ptx")));
    succeeds(valgrind().arg(program).arg("no.ptx").current_dir(folder()));
}

#[test]
fn many_threads() {
    let program = compile("tests/c/threads.c", &["-pthread"]);
    succeeds(run(&program).args(["40", "8"]));
    // There one thread runs at a time, and a call takes seconds.
    succeeds(valgrind().arg(program).args(["4", "1"]));
}

#[test]
fn a_launch_does_nothing_else_and_refuses_other_contexts() {
    let driver = folder().join("driver");
    fs::create_dir_all(&driver).unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/tests/pretend_driver.c");
    succeeds(tool("cc").args(["-w", "-shared", "-fPIC", "-o"]).arg(driver.join("libcuda.so.1")).arg(source));
    let program = compile("tests/c/launch.c", &[]);
    let mut said = String::new();
    for (variable, value) in [
        ("", ""),
        ("FAKE_PAGEABLE", "1"),
        ("FAKE_INIT", "803"),
        ("FAKE_COUNT", "0"),
        ("FAKE_CC0", "75"),
        ("FAKE_CC0", "89"),
        ("FAKE_DRIVER", "11080"),
    ] {
        let mut command = run(&program);
        command.env("LD_LIBRARY_PATH", &driver).envs((!variable.is_empty()).then_some((variable, value)));
        said += &format!("# {variable} {value}\n{}", succeeds(&mut command));
    }
    insta::assert_snapshot!(said);
}

/// What only a real driver can tell.
#[test]
fn a_real_gpu() {
    let program = compile("tests/c/gpu.c", &["-pthread"]);
    if devices().len() > 1 {
        println!("{}", succeeds(&mut run(&program)));
    }
}

/// The emulator, and a GPU if there is one that runs the kernels.
fn devices() -> Vec<(&'static str, Device)> {
    let gpu = Gpu::primary(0).and_then(|gpu| gpu.arch().map(|_| gpu)).map(|gpu| ("gpu", gpu.into()));
    [("emulator", Device::emulator())].into_iter().chain(gpu).collect()
}

/// Runs the call of `one_layer.c` from Rust, on the inputs that it wrote to its file, and expects the
/// bytes of its outputs.
fn compare_with_rust(device: &Device, file: &[u8]) {
    const S: usize = 5 * 30 + 20;
    let rope = Rope { pairs: Pairs::Interleaved, channels: 64, before: false, after: false, per_head: false };
    let spec = Spec::builder()
        .frames(5)
        .tokens_per_frame(30)
        .after(20)
        .heads(2)
        .head_dim(64)
        .qk_norm(QkNorm { kind: NormKind::Rms, over: NormOver::Head, eps: 1e-6 })
        .rope(rope)
        .spatial(Width::Density(0.5))
        .temporal(Width::Density(0.5));
    let module = Module::load(device, &spec.build().unwrap()).unwrap();
    let attention = SparseAttention::new(&module, 2, 2).unwrap();
    let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();

    let mut rest = file;
    let mut next = |bytes: usize| {
        let (part, others) = rest.split_at(bytes);
        rest = others;
        part
    };
    let (tensor_bytes, table_bytes) = (2 * S * 2 * 64 * 2, 150 * 32 * 4);
    let inputs: Vec<Buffer> = [tensor_bytes, tensor_bytes, tensor_bytes, 64 * 4, 64 * 4, table_bytes, table_bytes]
        .map(|bytes| device.upload(next(bytes)).unwrap())
        .into();
    let expected = [tensor_bytes, 2 * 2 * S * 4, 2 * 2 * 4, 2 * 2 * 2 * 4].map(next);
    assert!(rest.is_empty());
    let outputs = expected.map(|part| device.allocate(part.len() as u64).unwrap());
    let lengths = device.upload(&[20, 0, 0, 0, 7, 0, 0, 0]).unwrap();

    let tensor = |memory: &Buffer| Tensor { data: memory.address(), batch: S as u64 * 128, row: 128, head: 64 };
    let norm = |weight| NormWeights { weight, bias: 0 };
    let layer = Layer {
        q: tensor(&inputs[0]),
        k: tensor(&inputs[1]),
        v: tensor(&inputs[2]),
        out: tensor(&outputs[0]),
        q_norm: norm(inputs[3].address()),
        k_norm: norm(inputs[4].address()),
        cos: inputs[5].address(),
        sin: inputs[6].address(),
        after: Text { lengths: lengths.address(), q_norm: Some(norm(0)), k_norm: Some(norm(0)), ..Text::default() },
        lse: outputs[1].address(),
        found: Found { head_types: outputs[2].address(), errors: outputs[3].address(), ..Found::default() },
        half_widths: Some([52, 50]),
        seed: Some(1),
        ..Layer::default()
    };
    // SAFETY: the addresses are memory of this device, of the sizes that the spec asks for, and live
    // until the end.
    unsafe { attention.forward(Stream::DEFAULT, &layer, HeadTypes::Profiled, &workspace).unwrap() };
    for ((name, memory), expected) in ["out", "lse", "head types", "errors"].iter().zip(&outputs).zip(expected) {
        assert!(device.read(memory, 0, memory.bytes()).unwrap() == expected, "{name} differs from the Rust library's");
    }
}

/// A program that ships the library ships nothing else for it. The driver is opened at run time.
#[test]
fn every_linux_has_what_the_library_needs() {
    let needed = succeeds(tool("readelf").arg("-d").arg(Path::new(common::library()).join("libframestride.so")));
    let names =
        needed.lines().filter(|line| line.contains("(NEEDED)")).map(|line| line.split(['[', ']']).nth(1).unwrap());
    for name in names {
        assert!(["libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"].contains(&name), "{name}");
    }
    assert!(needed.contains("Library soname: [libframestride.so]"), "{needed}");
}
