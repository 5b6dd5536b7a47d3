//! How the command writes its results. What stands at a path is never lost, and a path that cannot
//! be written is refused before the work.
#![cfg(target_os = "linux")]

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use framestride::Spec;
use framestride_check::tensors::{Inputs, Tokens};
use safetensors::tensor::{Dtype, TensorView};

const PNG: &[u8] = b"\x89PNG";

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_framestride"));
    command.args(arguments);
    command
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The quickest command that writes a file.
fn plot(out: &Path) -> Output {
    command(&["plot", "tiny_plain", "--out", path(out)]).output().unwrap()
}

#[track_caller]
fn refused(output: &Output, words: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains(words), "{error}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Q, K and V of `tiny_text_last`.
fn tensors(file: &Path) {
    let spec = Spec::shipped("tiny_text_last").unwrap();
    let inputs = Inputs::random(&spec, 1, 2, 5);
    let bytes = |tokens: &Tokens| tokens.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
    let data = [("q", bytes(&inputs.q)), ("k", bytes(&inputs.k)), ("v", bytes(&inputs.v))];
    let views =
        data.iter().map(|(name, data)| (*name, TensorView::new(Dtype::BF16, vec![1, 139, 2, 64], data).unwrap()));
    fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn run(qkv: &Path, more: &[&str]) -> Output {
    let arguments = ["run", "tiny_text_last", "--device", "emulator", "--qkv", path(qkv)];
    command(&[&arguments[..], more].concat()).output().unwrap()
}

#[test]
fn inputs_are_never_outputs() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    tensors(&at("qkv.safetensors"));
    symlink("qkv.safetensors", at("link")).unwrap();
    fs::hard_link(at("qkv.safetensors"), at("other_name")).unwrap();
    let before = fs::read(at("qkv.safetensors")).unwrap();
    for out in ["qkv.safetensors", "link", "other_name"] {
        refused(&run(&at("qkv.safetensors"), &["--out", path(&at(out))]), "a file that this run reads");
    }
    // The output's default name and a file of the report are refused too.
    symlink("qkv.safetensors", at("qkv.out.safetensors")).unwrap();
    refused(&run(&at("qkv.safetensors"), &[]), "a file that this run reads");
    fs::create_dir(at("report")).unwrap();
    symlink("../qkv.safetensors", at("report/report.json")).unwrap();
    let (qkv, report) = (at("qkv.safetensors"), at("report"));
    refused(&run(&qkv, &["--out", "/dev/null", "--report", path(&report)]), "a file that this run reads");
    let spec = at("spec.toml");
    let (_, text) = framestride::shapes::models().iter().find(|(name, _)| *name == "tiny_plain").unwrap();
    fs::write(&spec, text).unwrap();
    refused(&command(&["plot", path(&spec), "--out", path(&spec)]).output().unwrap(), "a file that this run reads");
    assert_eq!(
        (fs::read(at("qkv.safetensors")).unwrap(), fs::read_to_string(&spec).unwrap()),
        (before, (*text).to_owned())
    );
}

#[test]
fn what_cannot_be_written_is_said_before_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    tensors(&at("qkv.safetensors"));
    for out in ["no/such/folder/out", "qkv.safetensors/out", "dangling"] {
        if out == "dangling" {
            symlink("no/such/folder/out", at(out)).unwrap();
        }
        let output = run(&at("qkv.safetensors"), &["--out", path(&at(out))]);
        assert!(output.status.code() == Some(2) && output.stdout.is_empty(), "{out}");
    }
    refused(&run(&at("qkv.safetensors"), &["--out", "/no/such/folder/out"]), "mend: Make the folder first");
    refused(&plot(folder.path()), "a folder");
    refused(&run(&at("qkv.safetensors"), &["--out", "/dev/null", "--report", "/dev/null"]), "/dev/null: found a file");
    let beyond = at("qkv.safetensors/report");
    refused(&run(&at("qkv.safetensors"), &["--out", "/dev/null", "--report", path(&beyond)]), "cannot be made");
    symlink("loop", at("loop")).unwrap();
    assert_eq!(plot(&at("loop")).status.code(), Some(2));

    fs::write(at("kept"), "kept").unwrap();
    fs::set_permissions(at("kept"), Permissions::from_mode(0o444)).unwrap();
    refused(&plot(&at("kept")), "a read-only file");
    symlink("kept", at("link_to_kept")).unwrap();
    refused(&plot(&at("link_to_kept")), "a read-only file");
    assert_eq!(fs::read_to_string(at("kept")).unwrap(), "kept");
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 5, "nothing is left behind: {names:?}");
}

#[test]
fn files_are_replaced_behind_their_links() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("elsewhere")).unwrap();
    fs::write(at("elsewhere/file"), "old").unwrap();
    fs::set_permissions(at("elsewhere/file"), Permissions::from_mode(0o640)).unwrap();
    symlink("elsewhere/file", at("link")).unwrap();
    symlink("elsewhere/new", at("new")).unwrap();
    symlink("new", at("to_new")).unwrap();
    for (out, real) in [("link", "elsewhere/file"), ("to_new", "elsewhere/new")] {
        assert!(plot(&at(out)).status.success());
        assert!(fs::symlink_metadata(at(out)).unwrap().is_symlink());
        assert!(fs::symlink_metadata(at(real)).unwrap().is_file() && fs::read(at(real)).unwrap().starts_with(PNG));
    }
    assert_eq!(fs::metadata(at("elsewhere/file")).unwrap().mode() & 0o777, 0o640);
}

#[test]
fn pipes_and_devices_are_written_through() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut child = command(&["plot", "tiny_plain", "--out", path(&pipe)]).spawn().unwrap();
    let mut bytes = Vec::new();
    File::open(&pipe).unwrap().read_to_end(&mut bytes).unwrap();
    assert!(child.wait().unwrap().success() && bytes.starts_with(PNG));
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());

    assert!(plot(Path::new("/dev/null")).status.success());
    refused(&plot(Path::new("/dev/full")), "No space left");
    for device in ["/dev/null", "/dev/full"] {
        assert!(fs::metadata(device).unwrap().file_type().is_char_device(), "{device}");
    }
    let mut quiet = command(&["plot", "tiny_plain", "--out", "/dev/null"]);
    let output =
        quiet.stdout(OpenOptions::new().write(true).open("/dev/null").unwrap()).stderr(Stdio::piped()).output();
    assert!(output.unwrap().stderr.is_empty(), "what is thrown away is not said elsewhere");
    // Standard output holds the picture and nothing else, whether it is a pipe or a file.
    let output = plot(Path::new("/dev/stdout"));
    assert!(output.status.success() && output.stdout.starts_with(PNG) && output.stdout.ends_with(b"IEND\xaeB`\x82"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("wrote /dev/stdout"));
    let file = folder.path().join("redirected");
    let to = File::create(&file).unwrap();
    let status = command(&["plot", "tiny_plain", "--out", "/dev/stdout"]).stdout(to).stderr(Stdio::null()).status();
    assert!(status.unwrap().success());
    assert_eq!(fs::read(&file).unwrap(), bytes);
}

/// Kernels are outputs as all others. What stands in their way is said before they are built.
#[test]
fn kernels_are_outputs() {
    let folder = tempfile::tempdir().unwrap();
    let build = |out: &Path| command(&["build", "tiny_plain", "--out", path(out)]).output().unwrap();
    let kept = folder.path().join("tiny_plain.ptx");
    fs::write(&kept, "kept").unwrap();
    refused(&build(&kept), "found a file");
    fs::set_permissions(&kept, Permissions::from_mode(0o444)).unwrap();
    refused(&build(folder.path()), "a read-only file");
    let spec = folder.path().join("tiny_plain.json");
    let (_, text) = framestride::shapes::models().iter().find(|(name, _)| *name == "tiny_plain").unwrap();
    fs::write(&spec, text).unwrap();
    fs::remove_file(&kept).unwrap();
    let output = command(&["build", path(&spec), "--out", path(folder.path())]).output().unwrap();
    refused(&output, "a file that this run reads");
    assert_eq!(fs::read_to_string(&spec).unwrap(), *text);
}

/// When a disk fills up during the run, the report is printed all the same.
#[test]
fn a_report_is_not_lost_with_the_output() {
    let folder = tempfile::tempdir().unwrap();
    let qkv = folder.path().join("qkv.safetensors");
    tensors(&qkv);
    let output = run(&qkv, &["--out", "/dev/full"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stdout).contains("mean density"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/full: No space left"));
}

#[test]
fn an_output_is_no_file_of_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    tensors(&at("qkv.safetensors"));
    let (qkv, report) = (at("qkv.safetensors"), at("report"));
    let json = report.join("report.json");
    refused(&run(&qkv, &["--out", path(&json), "--report", path(&report)]), "a file of the report");
    symlink("../out.safetensors", &json).unwrap();
    let out = at("out.safetensors");
    refused(&run(&qkv, &["--out", path(&out), "--report", path(&report)]), "a file of the report");
    let both = at("both");
    refused(&run(&qkv, &["--out", path(&both), "--report", path(&both)]), "a folder");
    assert!(!out.exists());
}

#[test]
fn what_a_file_leaves_open_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let qkv = folder.path().join("qkv.safetensors");
    tensors(&qkv);
    let output = run(&qkv, &["--json", "--out", "/dev/null"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let spec = Spec::shipped("tiny_text_last").unwrap();
    let assumed = json["assumed"].as_array().unwrap();
    let says = |word: &str| assumed.iter().any(|line| line.as_str().unwrap().contains(word));
    assert_eq!(says("q_norm"), spec.qk_norm.is_some());
    assert_eq!(says("cos and sin"), spec.rope.is_some());
    assert!(spec.qk_norm.is_some() && spec.rope.is_some());
}

#[test]
fn every_input_has_an_output_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (name, out) in [
        ("layer.0.step.3", "layer.0.step.3.out.safetensors"),
        ("layer.0.step.4", "layer.0.step.4.out.safetensors"),
        ("a.b.safetensors", "a.b.out.safetensors"),
    ] {
        tensors(&at(name));
        assert!(run(&at(name), &[]).status.success());
        assert!(at(out).is_file(), "{out}");
    }
}

/// It is an error when standard output takes nothing more, except when its reader has enough.
#[test]
fn standard_output() {
    for arguments in [
        &["describe", "tiny_plain"][..],
        &["describe", "no_such_spec", "--json"],
        &["doctor"],
        &["--help"],
        &["--version"],
    ] {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = command(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains("standard output: No space left"), "{arguments:?}: {error}");

        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        let expected = if arguments.contains(&"no_such_spec") { 2 } else { 0 };
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(expected), "{arguments:?}: {error}");
        assert!(!error.contains("pipe") && !error.contains("panicked"), "{error}");
    }
}
