//! A user's crate (`fixtures/user`) whose `build.rs` builds kernels of a spec and of a device crate
//! of its own. It has framestride as packages, as a user of crates.io has it. They are vendored,
//! and there is neither a network nor a checkout. The test needs a device compiler, and takes a
//! minute the first time.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use framestride_builder::{Kernels, toolchain};
use serde_json::Value;

/// The folder of the user's crate.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("user")
}

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Copies the fixture to [`folder`].
fn copy() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/user");
    for file in
        ["Cargo.toml", "build.rs", "src/main.rs", "shapes/my_model.toml", "device/Cargo.toml", "device/src/lib.rs"]
    {
        let (from, to) = (fixture.join(file), folder().join(file));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    }
    let configuration = "[source.crates-io]\nreplace-with = \"vendored\"\n[source.vendored]\ndirectory = \"vendor\"\n\
                         [net]\noffline = true\n";
    fs::create_dir_all(folder().join(".cargo")).unwrap();
    fs::write(folder().join(".cargo/config.toml"), configuration).unwrap();
}

/// What a cargo prints that runs in the checkout without a network. It is the cargo of the device
/// compiler, which is new enough.
fn cargo_in_the_checkout(arguments: &[&str]) -> Vec<u8> {
    let toolchain = toolchain::find().unwrap_or_else(|error| panic!("{error}"));
    let mut cargo = Command::new(&toolchain.cargo);
    cargo.args(arguments).arg("--offline").current_dir(checkout()).env("RUSTC", &toolchain.rustc);
    let answer = cargo.output().unwrap();
    assert!(answer.status.success(), "{arguments:?}: {}", text(&answer.stderr));
    answer.stdout
}

/// Fills `vendor/` as `cargo vendor` does: with the packages that are made of the checkout, and
/// with everything they depend on. Returns the folders of framestride's packages.
fn vendor() -> &'static [PathBuf] {
    static VENDORED: OnceLock<Vec<PathBuf>> = OnceLock::new();
    VENDORED.get_or_init(make_vendor)
}

fn make_vendor() -> Vec<PathBuf> {
    let metadata = cargo_in_the_checkout(&["metadata", "--format-version=1", "--filter-platform=host-tuple"]);
    let metadata: Value = serde_json::from_slice(&metadata).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    // `publish` is null where nothing is said, and an empty list where publishing is forbidden.
    let is_published = |package: &&Value| package["source"].is_null() && package["publish"].is_null();
    let own: Vec<&str> =
        packages.iter().filter(is_published).map(|package| package["name"].as_str().unwrap()).collect();

    let vendor = folder().join("vendor");
    let _ = fs::remove_dir_all(&vendor);
    fs::create_dir_all(&vendor).unwrap();
    for package in packages.iter().filter(|package| !package["source"].is_null()) {
        let from = Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap();
        let to = vendor.join(from.file_name().unwrap());
        fs::create_dir(&to).unwrap();
        for entry in from.read_dir().unwrap().flatten().filter(|entry| entry.file_name() != CHECKSUMS) {
            std::os::unix::fs::symlink(entry.path(), to.join(entry.file_name())).unwrap();
        }
        fs::write(to.join(CHECKSUMS), r#"{"files":{}}"#).unwrap();
    }

    let target = folder().join("packages");
    let mut package =
        vec!["package", "--no-verify", "--allow-dirty", "--quiet", "--target-dir", target.to_str().unwrap()];
    package.extend(own.iter().flat_map(|name| ["--package", name]));
    cargo_in_the_checkout(&package);
    let unpack = |name: &&str| {
        let name = format!("{name}-{}", env!("CARGO_PKG_VERSION"));
        let mut tar = Command::new("tar");
        tar.arg("xzf").arg(target.join(format!("package/{name}.crate"))).arg("-C").arg(&vendor);
        assert!(tar.status().unwrap().success());
        let package = vendor.join(name);
        fs::write(package.join(CHECKSUMS), r#"{"files":{}}"#).unwrap();
        package
    };
    let unpacked = own.iter().map(unpack).collect();

    // Cargo believes that a version never changes, but these do.
    let mut hash = DefaultHasher::new();
    for name in own {
        let packed = target.join(format!("package/{name}-{}.crate", env!("CARGO_PKG_VERSION")));
        fs::read(packed).unwrap().hash(&mut hash);
    }
    let (kept, hash) = (folder().join("packages.hash"), hash.finish().to_string());
    if fs::read_to_string(&kept).is_ok_and(|known| known == hash) {
        return unpacked;
    }
    let _ = fs::remove_dir_all(folder().join("target"));
    fs::write(kept, hash).unwrap();
    unpacked
}

/// The file of a package's digests in a vendored source. This test has none to check.
const CHECKSUMS: &str = ".cargo-checksum.json";

/// `cargo run` as its user would type it. What this test's own cargo says of this crate does not
/// reach it. Rustup's variables stay, and rustup must install nothing, because a test must never
/// change the machine's toolchains.
fn run() -> Output {
    let mut cargo = Command::new(env!("CARGO"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO") || text.starts_with("RUSTC") || text == "FRAMESTRIDE_SOURCE" {
            cargo.env_remove(&name);
        }
    }
    // An empty CARGO_HOME has no registry and nothing that was downloaded.
    cargo.env("CARGO_HOME", folder().join("home")).env("CARGO_TARGET_DIR", folder().join("target"));
    cargo.env("RUSTUP_AUTO_INSTALL", "0");
    // The rustc beside this cargo is used, not the one that a proxy of rustup would choose.
    let bin = Path::new(env!("CARGO")).parent().unwrap();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(bin.to_path_buf()).chain(std::env::split_paths(&path));
    cargo.env("PATH", std::env::join_paths(folders).unwrap());
    // A user may have set this for the CPU. It would break a build for the GPU.
    cargo.env("RUSTFLAGS", "-Ctarget-cpu=native --cfg of_the_host");
    cargo.args(["run", "-v"]).current_dir(folder()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn every_package_has_its_licences_and_a_readme() {
    for package in vendor() {
        let read = |folder: &Path, file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default();
        for file in ["LICENSE-MIT", "LICENSE-APACHE"] {
            assert_eq!(read(package, file), read(&checkout(), file), "{file} of {}", package.display());
        }
        assert!(read(package, "README.md").contains("framestride"), "{} has no README.md", package.display());
    }
}

#[test]
fn a_build_script_builds_kernels_and_runs_again_when_it_must() {
    copy();
    vendor();
    let first = run();
    assert!(first.status.success(), "{}", text(&first.stderr));
    let printed = text(&first.stdout);
    let lines: Vec<&str> = printed.lines().collect();
    for (entries, own) in [(lines[0], false), (lines[1], true)] {
        for entry in ["pack(", "profile(", "select(", "attention("] {
            assert!(entries.contains(entry), "{entries} lacks {entry}");
        }
        assert_eq!(entries.contains("scale("), own, "{entries}");
    }
    // The manifest of the crate with a spelled-out shape holds that shape as a spec.
    assert!(printed.contains(r#"name = \"engine\""#) && printed.contains(r#""name": "factor""#), "{printed}");

    // The packages' own sources were compiled, and their PTX is the one that the checkout gives.
    let spec = folder().join("shapes/my_model.toml");
    let built = Kernels::from_spec(spec).build().unwrap_or_else(|error| panic!("{error}"));
    let out_dir = Path::new(lines.last().unwrap());
    let made = fs::read_to_string(out_dir.join("my_model.ptx")).unwrap();
    assert!(made == built.ptx, "the packages give other PTX than the checkout");

    let again = text(&run().stderr);
    assert!(again.contains("Fresh engine"), "nothing changed, but it was built again:\n{again}");

    for (file, watched, from, to) in [
        ("shapes/my_model.toml", "shapes/my_model.toml", "half_width = 41", "half_width = 43"),
        ("device/src/lib.rs", "device/src", "load_f32(data + offset) * factor", "load_f32(data + offset) + factor"),
    ] {
        let path = folder().join(file);
        let old = fs::read_to_string(&path).unwrap();
        assert!(old.contains(from));
        fs::write(&path, old.replace(from, to)).unwrap();
        let changed = run();
        let said = text(&changed.stderr);
        assert!(changed.status.success(), "{said}");
        let named = said.lines().any(|line| line.contains("Dirty engine") && line.contains(watched));
        assert!(named, "{watched} is no reason to build again:\n{said}");
    }

    // An error of the spec is an error of cargo's, with file and key.
    let path = folder().join("shapes/my_model.toml");
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("frames = 3", "frames = 0")).unwrap();
    let wrong = run();
    let said = text(&wrong.stderr);
    assert!(!wrong.status.success());
    assert!(said.contains("shapes/my_model.toml") && said.contains("frames"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
