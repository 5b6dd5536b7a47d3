//! The command as users run it: output, files and exit codes.

use std::path::Path;
use std::process::{Command, Output};

use framestride::Kernels;
use framestride::shapes::arch::Arch;
use framestride::shapes::spec::Spec;
use framestride_check::layer_run;
use framestride_check::tensors::{Inputs, Tokens};
use framestride_cli::tensor_files::load_inputs;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn framestride(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_framestride")).args(arguments).output().unwrap()
}

/// Standard output as JSON, and the exit code.
fn json(arguments: &[&str]) -> (Value, i32) {
    let output = framestride(&[&["--json"], arguments].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    let value = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    (value, output.status.code().unwrap())
}

fn tiny() -> Spec {
    Spec::shipped("tiny_text_last").unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn describe() {
    let output = framestride(&["describe", "demo", "--gpu", "h200"]);
    assert!(output.status.success());
    insta::assert_snapshot!(String::from_utf8(output.stdout).unwrap());
    let (value, code) = json(&["describe", "wan_14b_720p", "--gpu", "h100"]);
    assert_eq!((value["sequence"].as_u64(), code), (Some(75600), 0));
    assert_eq!(value["masks"][0]["density"], 1.0);
    let [expected] = &value["expected"].as_array().unwrap()[..] else { panic!("{value}") };
    assert_eq!((expected["gpu"].as_str(), expected["can_gain"].as_bool()), (Some("h100"), Some(true)));
    let said = |spec: &str| String::from_utf8(framestride(&["describe", spec]).stdout).unwrap();
    assert!(said("wan_14b_720p").contains("expected gain over framestride's own dense layer: 3."));
    assert!(said("tiny_plain").contains("whatever the half widths.\n  Run it dense."));
    let unknown = framestride(&["describe", "demo", "--gpu", "b200"]);
    assert_eq!(unknown.status.code(), Some(2));
    let error = String::from_utf8(unknown.stderr).unwrap();
    assert!(error.contains("b200") && error.contains("h100, h200"), "{error}");
}

#[test]
fn verify() {
    let (report, code) = json(&["verify", "tiny_text_last", "--device", "emulator", "--seed", "3"]);
    assert_eq!((report["ok"].as_bool(), report["device"].as_str(), code), (Some(true), Some("emulator"), 0));
    assert_eq!(report["seed"], 3);
    let checks = report["checks"].as_array().unwrap();
    for kernel in ["pack", "profile", "select", "attention"] {
        assert!(checks.iter().any(|check| check["kernel"] == kernel), "{kernel}");
    }
    let again = checks.iter().filter(|check| check["case"] == "profiled, run again");
    assert_eq!(again.map(|check| &check["compared"]).collect::<Vec<_>>(), [1, 1, 1, 1]);
    for check in checks {
        assert!(check["case"].is_string() && check["ok"].as_bool() == Some(true));
        assert!(check["rel_error"].as_f64().unwrap() <= check["tolerance"].as_f64().unwrap());
    }
}

/// Kernels have one wrong instruction. `verify` must say so, whatever the instruction is for.
#[test]
fn verify_finds_wrong_kernels() {
    let folder = tempfile::tempdir().unwrap();
    let kernels = Kernels::for_spec(&Spec::shipped("tiny_text_last").unwrap(), Arch::default()).unwrap();
    // The position of the body of an entry.
    let entry = |name: &str| kernels.ptx().find(&format!(".entry {name}(")).unwrap();
    let changes = [
        // The first one is for a norm over all heads.
        ("pack", 1, "rsqrt.approx.ftz.f32", "sqrt.approx.ftz.f32"),
        // These are exponentials, in the order of the text. A thread has 64 weights of a first tile
        // without offsets, then 64 of another tile. Factors follow, where offsets are lowered, and
        // the weights of the tile that made it necessary. The last are the weights of another tile
        // with offsets. The first weights must stay positive, or offsets mend it.
        ("attention", 0, "ex2.approx.ftz.f32", "abs.ftz.f32"),
        ("attention", 64, "ex2.approx.ftz.f32", "neg.ftz.f32"),
        ("attention", 128, "ex2.approx.ftz.f32", "neg.ftz.f32"),
        ("attention", 138, "ex2.approx.ftz.f32", "neg.ftz.f32"),
        ("attention", 202, "ex2.approx.ftz.f32", "neg.ftz.f32"),
        // The first four are for anchors, which short sequences have none of.
        ("attention", 4, "rcp.approx.ftz.f32", "neg.ftz.f32"),
        ("select", 0, "setp.lt.f32", "setp.gt.f32"),
        // The errors are not stored here, so what lay in their place stays.
        ("select", 0, "st.global", "// st.global"),
    ];
    for (kernel, nth, right, wrong) in changes {
        let places = kernels.ptx()[entry(kernel)..].match_indices(right);
        let at = entry(kernel) + places.map(|(at, _)| at).nth(nth).unwrap_or_else(|| panic!("{kernel} has no {right}"));
        let ptx = format!("{}{wrong}{}", &kernels.ptx()[..at], &kernels.ptx()[at + right.len()..]);
        let mut manifest = kernels.manifest().clone();
        manifest.ptx_sha256 = Sha256::digest(&ptx).iter().map(|byte| format!("{byte:02x}")).collect();
        let file = folder.path().join("wrong.ptx");
        std::fs::write(&file, ptx).unwrap();
        std::fs::write(folder.path().join("wrong.json"), manifest.to_json()).unwrap();
        let (report, code) =
            json(&["verify", "tiny_text_last", "--device", "emulator", "--seed", "1", "--ptx", path(&file)]);
        assert_eq!((report["ok"].as_bool(), code), (Some(false), 1), "{kernel}: {wrong} for {right}");
        // Only a result that depends on what the memory held before differs in another run.
        let mut again =
            report["checks"].as_array().unwrap().iter().filter(|check| check["case"] == "profiled, run again");
        assert_eq!(again.all(|check| check["ok"] == true), !wrong.starts_with("//"), "{kernel}: {wrong} for {right}");
    }
}

/// Tensors of a file in f32 give an output beside it, which equals what the library gives for them.
#[test]
fn run_on_tensors() {
    let (folder, spec) = (tempfile::tempdir().unwrap(), tiny());
    let inputs = Inputs::planted(&spec, 1, 2, 11);
    let floats = |tokens: &Tokens| -> Vec<u8> {
        let rows = (0..tokens.rows).flat_map(|row| (0..tokens.heads).map(move |head| (row, head)));
        rows.flat_map(|(row, head)| tokens.row(0, row, head)).flat_map(|x| (x as f32).to_le_bytes()).collect()
    };
    let tables = inputs.rope.as_ref().unwrap();
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let tensors = [
        ("q", vec![1, 139, 2, 64], floats(&inputs.q)),
        ("k", vec![1, 139, 2, 64], floats(&inputs.k)),
        ("v", vec![1, 139, 2, 64], floats(&inputs.v)),
        ("cos", vec![115, 32], bytes(&tables.cos)),
        ("sin", vec![115, 32], bytes(&tables.sin)),
    ];
    let views =
        tensors.iter().map(|(name, shape, data)| (*name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    let file = folder.path().join("layer.safetensors");
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    assert_eq!(load_inputs(&file, &spec).unwrap(), inputs);

    let (report, code) = json(&["run", "tiny_text_last", "--device", "emulator", "--qkv", path(&file)]);
    assert_eq!((report["ok"].as_bool(), code), (Some(true), 0), "{report}");
    assert_eq!(
        (report["heads"][0]["mask"].as_str(), report["heads"][1]["mask"].as_str()),
        (Some("spatial"), Some("temporal"))
    );
    let written = std::fs::read(folder.path().join("layer.out.safetensors")).unwrap();
    let out = SafeTensors::deserialize(&written).unwrap();
    assert_eq!(out.tensor("out").unwrap().shape(), [1, 139, 2, 64]);
    assert_eq!(out.tensor("lse").unwrap().shape(), [1, 2, 139]);
    let module = framestride::Module::load(&framestride::Device::emulator(), &Spec::shipped("tiny_text_last").unwrap());
    let expected = layer_run::run_layer(&module.unwrap(), &inputs, &[], &|_, _| ()).unwrap().out;
    let expected: Vec<u8> = expected.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    assert_eq!(out.tensor("out").unwrap().data(), expected);
}

/// V has one NaN. Every row of the head reads its tile and may be NaN. Nothing is left to compare
/// there, which is no success. The other head is right.
#[test]
fn run_carries_nan() {
    let (folder, spec) = (tempfile::tempdir().unwrap(), tiny());
    let inputs = Inputs::planted(&spec, 1, 2, 12);
    let mut v = inputs.v.clone();
    v.bits[inputs.v.index(0, 60, 0)] = 0x7fc0;
    let bytes = |tokens: &Tokens| tokens.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
    let tensors = [("q", bytes(&inputs.q)), ("k", bytes(&inputs.k)), ("v", bytes(&v))];
    let views =
        tensors.iter().map(|(name, data)| (*name, TensorView::new(Dtype::BF16, vec![1, 139, 2, 64], data).unwrap()));
    let file = folder.path().join("nan.safetensors");
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    let (report, code) = json(&["run", "tiny_text_last", "--device", "emulator", "--qkv", path(&file)]);
    assert_eq!((report["ok"].as_bool(), code), (Some(false), 1), "{report}");
    assert_eq!(report["heads"][0]["nan_rows"], 139, "{report}");
    assert!(report["heads"][0]["reason"].as_str().unwrap().contains("nothing to compare"), "{report}");
    assert_eq!(
        (&report["heads"][1]["nan_rows"], report["heads"][1]["ok"].as_bool()),
        (&0.into(), Some(true)),
        "{report}"
    );
}

/// Every element of the inputs that is not finite is named with its index and value. What it
/// reaches is not compared, and the rest is right.
#[test]
fn run_names_what_is_not_finite() {
    let (folder, spec) = (tempfile::tempdir().unwrap(), tiny());
    let inputs = Inputs::planted(&spec, 1, 2, 13);
    let tables = inputs.rope.as_ref().unwrap();
    let run = |tensor: &str, element: usize, bits: &[u8]| {
        let bytes = |tokens: &Tokens| tokens.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let mut tensors = [
            ("q", Dtype::BF16, vec![1, 139, 2, 64], bytes(&inputs.q)),
            ("k", Dtype::BF16, vec![1, 139, 2, 64], bytes(&inputs.k)),
            ("v", Dtype::BF16, vec![1, 139, 2, 64], bytes(&inputs.v)),
            ("cos", Dtype::F32, vec![115, 32], floats(&tables.cos)),
            ("sin", Dtype::F32, vec![115, 32], floats(&tables.sin)),
            ("k_norm.weight", Dtype::F32, vec![64], floats(&[1.0; 64])),
        ];
        let (.., data) = tensors.iter_mut().find(|(name, ..)| *name == tensor).unwrap();
        data[element * bits.len()..][..bits.len()].copy_from_slice(bits);
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        let file = folder.path().join("inputs.safetensors");
        std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
        json(&["run", "tiny_text_last", "--device", "emulator", "--qkv", path(&file)])
    };
    let element = inputs.q.index(0, 60, 1) + 3;
    let (inf, minus_inf, nan) = (0x7f80u16.to_le_bytes(), 0xff80u16.to_le_bytes(), f32::NAN.to_le_bytes());
    for (tensor, element, bits, message) in [
        ("q", element, &inf[..], "q[0, 60, 1, 3] is inf"),
        ("k", element, &inf, "k[0, 60, 1, 3] is inf"),
        ("v", element, &minus_inf, "v[0, 60, 1, 3] is -inf"),
        ("cos", 1500, &nan, "cos, element 1500, is NaN"),
    ] {
        let (report, code) = run(tensor, element, bits);
        // A value in V reaches all rows of its head.
        let expected = if tensor == "v" { (Some(false), 1) } else { (Some(true), 0) };
        assert_eq!((report["ok"].as_bool(), code), expected, "{report}");
        assert_eq!(report["not_finite"], serde_json::json!([message]));
        let rows = |head: usize| report["heads"][head]["nan_rows"].as_u64().unwrap();
        assert!(rows(1) > 0 && (tensor == "cos" || rows(0) == 0), "{report}");
    }
    // Every row of K has it. Nothing is left to compare, which is no success.
    let (report, code) = run("k_norm.weight", 5, &f32::INFINITY.to_le_bytes());
    assert_eq!((report["ok"].as_bool(), code), (Some(false), 1), "{report}");
    assert_eq!(report["not_finite"][0], "k_norm.weight, element 5, is inf");
    assert!(report["heads"][0]["reason"].as_str().unwrap().contains("nothing to compare"), "{report}");
}

/// Weights of 1000 make scores so large that rounding moves any output by more than its size. Zeros
/// would pass.
#[test]
fn run_says_what_is_not_comparable() {
    let mut inputs = Inputs::random(&tiny(), 1, 2, 14);
    inputs.q_norm = framestride_check::tensors::Norm { weight: Some(vec![1000.0; 64]), bias: None };
    inputs.k_norm = inputs.q_norm.clone();
    let module = framestride::Module::load(&framestride::Device::emulator(), &Spec::shipped("tiny_text_last").unwrap());
    let report = layer_run::run_layer(&module.unwrap(), &inputs, &[], &|_, _| ()).unwrap().report;
    assert!(!report.ok && report.not_finite.is_empty());
    for head in report.heads {
        assert!(head.tolerance > 1.0 && head.reason.unwrap().contains("not comparable"));
    }
}

#[test]
fn run_on_video_writes_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let video = concat!(env!("CARGO_MANIFEST_DIR"), "/data/bigbuckbunny_16x72x128.safetensors");
    let report_folder = folder.path().join("report");
    let (report, code) =
        json(&["run", "tiny_plain", "--device", "emulator", "--video", video, "--report", path(&report_folder)]);
    assert_eq!((report["ok"].as_bool(), code), (Some(true), 0), "{report}");
    let files = report["files"].as_array().unwrap();
    assert_eq!(files.len(), 5, "a head, three masks and report.json: {files:?}");
    for file in files {
        assert!(std::fs::metadata(file.as_str().unwrap()).unwrap().len() > 100);
    }
    let saved = std::fs::read_to_string(report_folder.join("report.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&saved).unwrap()["heads"], report["heads"]);
}

#[test]
fn bad_input_is_two() {
    let folder = tempfile::tempdir().unwrap();
    let spec = folder.path().join("bad.toml");
    std::fs::write(&spec, "name = \"bad\"\n[video]\nframes = 0\n").unwrap();
    let cases: [&[&str]; 8] = [
        &["describe", path(&spec)],
        &["describe", "no_such_spec"],
        &["verify", path(&spec)],
        &["verify", "demo", "--device", "tpu"],
        &["verify", "demo", "--ptx", "no/such.ptx"],
        &["build", "demo", "--family", "sm_70", "--out", path(folder.path())],
        &["run", "demo", "--qkv", "no/such.safetensors"],
        &["plot", "demo", "--out", "no/such/folder/masks.png"],
    ];
    for arguments in cases {
        let output = framestride(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains("error"), "{arguments:?}: {message}");
        assert!(!message.contains("panicked"), "{arguments:?}: {message}");
    }
    if framestride::Device::gpu(0).is_err() {
        let output = framestride(&["run", "hunyuan_video_720p"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8(output.stderr).unwrap().contains("minutes in the emulator"));
        let output = framestride(&["verify", "demo", "--device", "gpu"]);
        assert_eq!(output.status.code(), Some(2));
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains("no GPU") && message.contains("mend: Try --device emulator"), "{message}");
    }
}

#[test]
fn doctor_looks_at_everything() {
    let (found, code) = json(&["doctor"]);
    assert_eq!(code, 0);
    assert!(found["can_build"].is_boolean() && found["gpus"].is_array());
    let shipped = found["shipped"].as_array().unwrap();
    assert_eq!(shipped.len(), framestride::shapes::models().len(), "every shipped spec has its kernels");
}

/// Where no compiler can be found, doctor says that nothing but compiling needs one, and kernels
/// are loaded.
#[test]
fn without_a_compiler() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_framestride"));
        command.args(arguments).env_clear().env("HOME", folder.path()).current_dir(folder.path());
        let output = command.output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code(), text)
    };
    let (code, found) = run(&["doctor"]);
    assert!(code == Some(0) && found.contains("without them everything works"), "{found}");
    let (code, found) = run(&["run", "tiny_plain", "--device", "emulator"]);
    assert!(code == Some(0) && found.contains("tiny_plain on emulator"), "{found}");
    let (code, found) = run(&["build", "tiny_plain", "--template"]);
    assert!(code == Some(0) && folder.path().join("tiny_plain.json").is_file(), "{found}");
    let (code, found) = run(&["build", "tiny_plain"]);
    assert!(code == Some(2) && found.contains("no device compiler"), "{found}");
}

/// What a driver says is looked at before anything is launched. Where it is older than the kernels'
/// PTX, every message names the least driver, and `auto` takes the emulator. The pretended driver
/// only answers what is asked before a launch.
#[cfg(target_os = "linux")]
#[test]
fn drivers() {
    let folder = tempfile::tempdir().unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pretend_driver.c");
    let library = folder.path().join("libcuda.so.1");
    let compiled = Command::new("cc").args(["-w", "-shared", "-fPIC", "-o", path(&library), source]).status();
    let Ok(status) = compiled else { return eprintln!("skipped: no C compiler") };
    assert!(status.success());
    let run = |driver: &str, capability: &str, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_framestride"));
        command.env("LD_LIBRARY_PATH", folder.path()).env("FAKE_DRIVER", driver).env("FAKE_CC0", capability);
        let output = command.args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let gpu = |driver: &str, capability: &str| -> Value {
        let (code, found, _) = run(driver, capability, &["doctor", "--json"]);
        assert_eq!(code, 0);
        serde_json::from_str::<Value>(&found).unwrap()["gpus"][0].clone()
    };
    for (driver, capability, family) in [
        ("12030", "90", "sm_90a"),
        ("12080", "90", "sm_90a"),
        ("13000", "90", "sm_90a"),
        ("12020", "90", "sm_80"),
        ("12080", "89", "sm_80"),
        ("12080", "120", "sm_80"),
    ] {
        let gpu = gpu(driver, capability);
        assert_eq!((gpu["family"].as_str(), &gpu["missing"]), (Some(family), &Value::Null));
    }
    // Of several GPUs the first that can is taken, or the one that is named.
    let several = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_framestride"));
        command.env("LD_LIBRARY_PATH", folder.path()).env("FAKE_COUNT", "3").args(arguments);
        command.envs([
            ("FAKE_CC0", "75"),
            ("FAKE_NAME0", "an RTX 2080"),
            ("FAKE_CC1", "86"),
            ("FAKE_NAME1", "an RTX 3090"),
        ]);
        let output = command.output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    let listed = several(&["doctor"]);
    for gpu in ["GPU 0      an RTX 2080", "GPU 1      an RTX 3090", "GPU 2      NVIDIA H100"] {
        assert!(listed.contains(gpu), "{listed}");
    }
    assert!(listed.contains("runs the kernels of sm_80") && listed.contains("runs the kernels of sm_90a"), "{listed}");
    // The pretended memory is full, which is found out behind the choice.
    assert!(several(&["run", "tiny_plain", "--device", "gpu"]).contains("device memory"));
    assert!(several(&["run", "tiny_plain", "--device", "gpu:2"]).contains("device memory"));
    assert!(several(&["run", "tiny_plain", "--device", "gpu:0"]).contains("an RTX 2080 of compute capability 7.5"));
    assert!(several(&["run", "tiny_plain", "--device", "gpu:3"]).contains("GPU 3"));
    assert!(several(&["run", "tiny_plain", "--device", "gpu:x"]).contains("gpu:NUMBER such as gpu:1"));
    let wrong = several(&["run", "tiny_plain", "--device", "gpu:1", "--family", "sm_90a"]);
    assert!(wrong.contains("Load kernels of another family"), "{wrong}");
    for (driver, capability, least) in
        [("11080", "90", "CUDA 12.0"), ("11080", "80", "CUDA 12.0"), ("12080", "75", "8.0 or later")]
    {
        assert!(gpu(driver, capability)["family"].is_null());
        let (code, found, _) = run(driver, capability, &["doctor"]);
        assert!(code == 0 && found.contains("does not run the kernels") && found.contains(least), "{found}");
        let (code, found, error) = run(driver, capability, &["run", "tiny_plain"]);
        assert!(code == 0 && found.contains("tiny_plain on emulator"), "{found}{error}");
        assert!(error.starts_with("note: on the emulator. GPU") && error.contains(least), "{error}");
        for command in ["verify", "run", "bench"] {
            let (code, _, error) = run(driver, capability, &[command, "tiny_plain", "--device", "gpu"]);
            assert!(code == 2 && error.contains(least), "{command}, {code}: {error}");
        }
    }
    // Gains are estimated for the card, or where it has no rates for those that have some.
    let estimated = |name: Option<&str>, variables: &[(&str, &str)]| -> (Vec<String>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_framestride"));
        command.env("LD_LIBRARY_PATH", folder.path()).envs(name.map(|name| ("FAKE_NAME0", name)));
        command.envs(variables.iter().copied()).args(["describe", "demo"]);
        let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let json: Value = serde_json::from_slice(&command.arg("--json").output().unwrap().stdout).unwrap();
        let gpus = json["expected"].as_array().unwrap().iter().map(|gpu| gpu["gpu"].as_str().unwrap().into());
        (gpus.collect(), text)
    };
    for (name, gpus) in [
        ("NVIDIA H100 80GB HBM3", &["h100"][..]),
        ("NVIDIA H200", &["h200"]),
        ("NVIDIA H100 PCIe", &["h100", "h200"]),
        ("NVIDIA GH200 480GB", &["h100", "h200"]),
    ] {
        let (found, text) = estimated(Some(name), &[]);
        assert_eq!(found, gpus, "{name}");
        assert_eq!(text.contains(&format!("there are no rates of the {name}")), gpus.len() > 1, "{text}");
        for gpu in gpus {
            assert!(text.contains(&format!("estimated for an {}", gpu.to_uppercase())), "{text}");
        }
    }
    assert_eq!(estimated(None, &[("FAKE_INIT", "803")]).0, ["h100", "h200"]);
    // A context is not needed for a name, and might not be had.
    assert_eq!(estimated(None, &[("FAKE_RETAIN", "2")]).0, ["h100"]);
    // These drivers do not get as far as a card's name.
    for (variable, value) in [("FAKE_INIT", "803"), ("FAKE_COUNT", "0"), ("FAKE_RETAIN", "2")] {
        let run = |device: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_framestride"));
            command.env("LD_LIBRARY_PATH", folder.path()).env(variable, value);
            command.args(["run", "tiny_plain", "--device", device]).output().unwrap()
        };
        let (auto, gpu) = (run("auto"), run("gpu"));
        let error = String::from_utf8(auto.stderr).unwrap();
        assert!(auto.status.success() && error.starts_with("note: on the emulator. no GPU"), "{error}");
        assert_eq!(gpu.status.code(), Some(2), "{variable}");
    }
    // The memory of a card is full. That is bad input, and no fault of a kernel.
    let (code, _, error) = run("12080", "90", &["run", "tiny_plain", "--device", "gpu"]);
    assert!(code == 2 && error.contains("device memory"), "{code}: {error}");
    assert!(
        Kernels::for_spec(&Spec::shipped("tiny_plain").unwrap(), Arch::default())
            .unwrap()
            .ptx()
            .contains("\n.version 8.3\n"),
        "12.3 is the first for PTX 8.3"
    );
}

/// Scale, dense heads and lengths of text are options.
#[test]
fn run_with_options() {
    let folder = tempfile::tempdir().unwrap();
    let spec = tiny();
    let mut inputs = Inputs::planted(&spec, 2, 2, 13);
    let bytes = |tokens: &Tokens| tokens.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
    let tensors = [("query", bytes(&inputs.q)), ("key", bytes(&inputs.k)), ("value", bytes(&inputs.v))];
    let views =
        tensors.iter().map(|(name, data)| (*name, TensorView::new(Dtype::BF16, vec![2, 139, 2, 64], data).unwrap()));
    let file = folder.path().join("layer.safetensors");
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    let run_file = ["run", "tiny_text_last", "--device", "emulator", "--qkv", path(&file)];
    let options = ["--scale", "0.25", "--dense-heads", "1", "--text-lengths", "5,24"];
    let (report, code) = json(&[&run_file[..], &options].concat());
    assert_eq!((report["ok"].as_bool(), code), (Some(true), 0), "{report}");
    let masks: Vec<_> = report["heads"].as_array().unwrap().iter().map(|head| head["mask"].as_str().unwrap()).collect();
    assert_eq!(masks, ["spatial", "dense", "spatial", "dense"]);
    (inputs.scale, inputs.after.lengths) = (Some(0.25), Some(vec![5, 24]));
    let module = framestride::Module::load(&framestride::Device::emulator(), &Spec::shipped("tiny_text_last").unwrap());
    inputs.rope = Some(framestride_check::rope::RopeTables::from_grid(&spec, 2));
    let expected = bytes(&layer_run::run_layer(&module.unwrap(), &inputs, &[1], &|_, _| ()).unwrap().out);
    let written = std::fs::read(folder.path().join("layer.out.safetensors")).unwrap();
    assert!(SafeTensors::deserialize(&written).unwrap().tensor("out").unwrap().data() == expected);

    for (options, words) in [
        (["--scale", "3e38"], "scale: found 3e38"),
        (["--scale", "nan"], "scale: found NaN"),
        (["--scale=-1", "--json"], "scale: found -1"),
        (["--dense-heads", "0,2"], "--dense-heads: found head 2"),
        (["--text-lengths", "5"], "one length of at most 24 for each of 2 batch items"),
        (["--text-lengths", "5,25"], "at most 24"),
        (["--text-lengths", "5,-1"], "invalid"),
        (["--before-lengths", "5,6"], "--before-lengths: found a spec with text on one side of the video"),
        (["--after-lengths", "5,6"], "allowed: --text-lengths"),
    ] {
        let output = framestride(&[&run_file[..], &options].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && error.contains(words), "{options:?}: {error}");
    }
}

/// Where text stands on both sides of the video, options give the lengths of each.
#[test]
fn run_with_text_on_both_sides() {
    let spec = Spec::shipped("tiny_text_rope").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let run = ["run", "tiny_text_rope", "--device", "emulator", "--out", path(&out)];
    let (report, code) = json(&[&run[..], &["--before-lengths", "5", "--after-lengths", "0"]].concat());
    assert_eq!((report["ok"].as_bool(), code), (Some(true), 0), "{report}");
    let mut inputs = Inputs::planted(&spec, 1, 2, 0);
    (inputs.before.lengths, inputs.after.lengths) = (Some(vec![5]), Some(vec![0]));
    let module = framestride::Module::load(&framestride::Device::emulator(), &spec).unwrap();
    let expected = layer_run::run_layer(&module, &inputs, &[], &|_, _| ()).unwrap().out;
    // Kernels read the same where the text is apart.
    for apart in [[true, false], [false, true], [true, true]] {
        [inputs.before.is_apart, inputs.after.is_apart] = apart;
        let found = layer_run::run_layer(&module, &inputs, &[], &|_, _| ()).unwrap().out;
        assert!(found == expected, "{apart:?}");
    }
    let expected: Vec<u8> = expected.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let written = std::fs::read(&out).unwrap();
    assert!(SafeTensors::deserialize(&written).unwrap().tensor("out").unwrap().data() == expected);

    let output = framestride(&[&run[..], &["--text-lengths", "5"]].concat());
    let error = String::from_utf8(output.stderr).unwrap();
    let words = ["--text-lengths: found a spec with text on both sides", "allowed: --before-lengths, --after-lengths"];
    assert!(output.status.code() == Some(2) && words.iter().all(|words| error.contains(words)), "{error}");
}

/// Every command can read a spec from a pipe, which gives its text once.
#[cfg(unix)]
#[test]
fn specs_from_pipes() {
    use std::io::Write;
    use std::process::Stdio;
    let folder = tempfile::tempdir().unwrap();
    let (_, text) = framestride::shapes::models().iter().find(|(name, _)| *name == "tiny_plain").unwrap();
    let piped = |command: &str, more: &[&str]| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_framestride"));
        child.args([command, "/dev/stdin"]).args(more).current_dir(folder.path());
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let emulator = ["--device", "emulator"];
    for (command, more) in [
        ("describe", &[][..]),
        ("verify", &emulator),
        ("run", &emulator),
        ("plot", &["--out", "masks.png"]),
        ("build", &["--out", "kernels"]),
    ] {
        let output = piped(command, more);
        let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && !said.is_empty(), "{command}: {said}{error}");
    }
    assert_eq!(piped("describe", &[]).stdout, framestride(&["describe", "tiny_plain"]).stdout);
    let built = Kernels::from_file(folder.path().join("kernels/tiny_plain.ptx")).unwrap();
    assert_eq!(built.manifest().spec.as_deref(), Some(*text));
    // A bench needs a GPU, and says so only when the spec is read.
    let output = piped("bench", &emulator);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && error.contains("times say nothing"), "{error}");
    // Another spec than that of the kernels is told apart, whatever its comments say.
    let kernels = ["--device", "emulator", "--ptx", "kernels/tiny_plain.ptx"];
    assert!(piped("run", &kernels).status.success());
    let mut other = Command::new(env!("CARGO_BIN_EXE_framestride"));
    let other = other.args(["verify", "tiny_text_last"]).args(kernels).current_dir(folder.path()).output().unwrap();
    assert!(String::from_utf8_lossy(&other.stderr).contains("kernels of another spec, named tiny_plain"));
}

/// Shipped names are found behind folders and mistakes, and no terminal obeys an argument in a
/// message.
#[test]
fn specs_and_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let in_folder = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_framestride"));
        command.args(arguments).current_dir(folder.path());
        command
    };
    let expected = framestride(&["describe", "tiny_plain"]).stdout;
    let (_, text) = framestride::shapes::models().iter().find(|(name, _)| *name == "tiny_plain").unwrap();
    std::fs::create_dir(folder.path().join("demo")).unwrap();
    std::fs::write(folder.path().join("tiny_text_last"), text).unwrap();
    assert_eq!(in_folder(&["describe", "demo"]).output().unwrap().stdout, framestride(&["describe", "demo"]).stdout);
    let shipped = framestride(&["describe", "tiny_text_last"]).stdout;
    assert_eq!(in_folder(&["describe", "tiny_text_last"]).output().unwrap().stdout, shipped);
    assert_eq!(in_folder(&["describe", "./tiny_text_last"]).output().unwrap().stdout, expected);

    for (argument, words) in [
        ("hunyan_video_720p", "did you mean hunyuan_video_720p?"),
        ("tiny-plain", "did you mean tiny_plain?"),
        ("MiniMax-H3 5s", "did you mean minimax_h3_5s_768x1344?"),
        ("nothing_like_it", "lists the names"),
        ("demo/", "cannot be read"),
        ("no\u{1b}[31msuch", r"no\u{1b}[31msuch"),
    ] {
        let output = in_folder(&["describe", argument]).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && error.contains(words), "{argument}: {error}");
        assert!(error.len() <= 2048 && !error.contains('\u{1b}'), "{error}");
    }
    let long = "\u{1b}[31m".repeat(20_000);
    for arguments in
        [&["describe", "demo", &long][..], &[&long], &["describe", &long], &["verify", "demo", "--device", &long]]
    {
        let output = framestride(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(error.len() <= 2048 && !error.contains('\u{1b}'), "{}: {error:.300}", error.len());
    }
}

/// A file of 248 bytes or a spec asks for more memory than there is. It is an error before anything
/// is allocated.
#[test]
fn more_memory_than_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("huge.safetensors");
    let views =
        ["q", "k", "v"].map(|name| (name, TensorView::new(Dtype::BF16, vec![0, 668, 1_000_000, 64], &[]).unwrap()));
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    let output = framestride(&["run", "tiny_heads_sinks", "--device", "emulator", "--qkv", path(&file)]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && error.contains("1000000 heads"), "{error}");
    // Q alone has more than a terabyte here.
    let spec = folder.path().join("huge.toml");
    let text = "name = 'huge'\n[video]\nframes = 64\ntokens_per_frame = 65536\n[attention]\nheads = 1000\nhead_dim = 128\n\
        [masks.spatial]\nhalf_width = 65536\n[masks.temporal]\nhalf_width = 65536\n";
    std::fs::write(&spec, text).unwrap();
    for command in ["verify", "run"] {
        let output = framestride(&[command, path(&spec), "--device", "emulator"]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && error.contains("device memory: found"), "{error}");
    }
    if Path::new("/dev/zero").exists() {
        let output =
            framestride(&["run", "tiny_plain", "--device", "emulator", "--qkv", "/dev/zero", "--out", "/dev/null"]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && error.contains("does not parse"), "{error}");
    }
}

#[test]
fn bench_refuses_what_it_cannot_time() {
    let emulator: &[&str] = &["--device", "emulator"];
    let two_types: &[&str] = &["--types", "dense", "spatial", "--out", "out.safetensors"];
    for (arguments, expected) in [(emulator, "times say nothing"), (two_types, "2 --types")] {
        let arguments = [&["bench", "tiny_plain"], arguments].concat();
        let output = framestride(&arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(expected) && error.contains("mend"), "{error}");
    }
}
