//! A user's crate outside of the workspace, whose `build.rs` builds kernels of a spec and of a device crate of its own
//! (`fixtures/user`). Needs a device compiler; takes a minute the first time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Copies the fixture to a folder of the target directory, with the path of the checkout put in.
fn copy() -> PathBuf {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/user");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("user");
    for file in
        ["Cargo.toml", "build.rs", "src/main.rs", "shapes/my_model.toml", "device/Cargo.toml", "device/src/lib.rs"]
    {
        let (from, to) = (fixture.join(file), folder.join(file));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        let text = fs::read_to_string(from).unwrap().replace("FRAMESTRIDE", &checkout.display().to_string());
        fs::write(to, text).unwrap();
    }
    // The versions that the checkout is tested with.
    fs::copy(checkout.join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    folder
}

/// `cargo run` as its user would type it: what this test's own cargo says of this crate does not reach it. Rustup's variables
/// stay, and it is told to install nothing: a test must never change the machine's toolchains.
fn run(folder: &Path) -> Output {
    let mut cargo = Command::new(env!("CARGO"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let of_this_build = (text.starts_with("CARGO") && text != "CARGO_HOME") || text.starts_with("RUSTC");
        if of_this_build {
            cargo.env_remove(&name);
        }
    }
    cargo.env("RUSTUP_AUTO_INSTALL", "0").env("CARGO_TARGET_DIR", folder.join("target"));
    // The rustc beside this cargo, and not whatever a rustup proxy on the PATH would choose.
    let bin = Path::new(env!("CARGO")).parent().unwrap();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(bin.to_path_buf()).chain(std::env::split_paths(&path));
    cargo.env("PATH", std::env::join_paths(folders).unwrap());
    // What a user may have set for the CPU, and what would break a build for the GPU.
    cargo.env("RUSTFLAGS", "-Ctarget-cpu=native --cfg of_the_host");
    cargo.args(["run", "-v"]).current_dir(folder).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_build_script_builds_kernels_and_runs_again_when_it_must() {
    let folder = copy();
    let first = run(&folder);
    assert!(first.status.success(), "{}", text(&first.stderr));
    let printed = text(&first.stdout);
    let lines: Vec<&str> = printed.lines().collect();
    for (entries, own) in [(lines[0], false), (lines[1], true)] {
        for entry in ["pack(", "profile(", "select(", "attention("] {
            assert!(entries.contains(entry), "{entries} lacks {entry}");
        }
        assert_eq!(entries.contains("scale("), own, "{entries}");
    }
    // The manifest of the crate with the shape spelled out carries it as a spec.
    assert!(printed.contains(r#"name = \"engine\""#) && printed.contains(r#""name": "factor""#), "{printed}");

    let again = text(&run(&folder).stderr);
    assert!(again.contains("Fresh engine"), "nothing changed, but it was built again:\n{again}");

    for (file, watched, from, to) in [
        ("shapes/my_model.toml", "shapes/my_model.toml", "half_width = 41", "half_width = 43"),
        ("device/src/lib.rs", "device/src", "load_f32(data + offset) * factor", "load_f32(data + offset) + factor"),
    ] {
        let path = folder.join(file);
        let old = fs::read_to_string(&path).unwrap();
        assert!(old.contains(from));
        fs::write(&path, old.replace(from, to)).unwrap();
        let changed = run(&folder);
        let said = text(&changed.stderr);
        assert!(changed.status.success(), "{said}");
        let named = said.lines().any(|line| line.contains("Dirty engine") && line.contains(watched));
        assert!(named, "{watched} is no reason to build again:\n{said}");
    }

    // An error of the spec is cargo's error, with file and key.
    let path = folder.join("shapes/my_model.toml");
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("frames = 3", "frames = 0")).unwrap();
    let wrong = run(&folder);
    let said = text(&wrong.stderr);
    assert!(!wrong.status.success());
    assert!(said.contains("shapes/my_model.toml") && said.contains("frames"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
