//! Nothing that lies above a project changes its PTX. The test needs a device compiler, and takes a
//! minute the first time.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use framestride_builder::Kernels;

const SPEC: &str = r#"name = "under_configuration"
[video]
frames = 5
tokens_per_frame = 6
[text]
tokens = 5
[attention]
heads = 2
head_dim = 64
dtype = "f16"
[masks.spatial]
density = 0.6
[masks.temporal]
density = 0.6
"#;

/// Everything that a configuration can say about how crates are compiled. With `incremental` alone
/// the warps of attention once waited for ever. The last tables break a build that obeys them.
const CONFIGURATION: &str = r#"paths = ["/nowhere/shapes"]
[build]
incremental = true
rustflags = ["-Copt-level=0", "--cfg=configured"]
rustc-wrapper = "/bin/false"
target-dir = "elsewhere"
target = "x86_64-unknown-linux-gnu"
dep-info-basedir = "/nowhere"
[profile.release]
opt-level = 0
lto = false
debug = true
debug-assertions = true
overflow-checks = true
incremental = true
[profile.release.package."*"]
opt-level = 0
codegen-units = 16
[profile.release.package.framestride-kernels]
opt-level = 1
debug-assertions = true
[profile.release.package.core]
opt-level = 0
[env]
CARGO_ENCODED_RUSTFLAGS = { value = "--cfg=configured", force = true }
RUSTC_BOOTSTRAP = { value = "0", force = true }
[target.nvptx64-nvidia-cuda]
linker = "/bin/false"
rustflags = ["--cfg=configured"]
[unstable]
build-std-features = ["nowhere"]
[patch.crates-io]
syn = { path = "/nowhere/syn" }
"#;

/// The folder in which this process builds, if it is a child of the test.
const CHILD: &str = "FRAMESTRIDE_TEST_BUILDS_IN";

/// The PTX of a build in `project`, by a child process that runs there.
fn build(project: &Path, home: Option<&Path>) -> String {
    fs::create_dir_all(project).unwrap();
    fs::write(project.join("spec.toml"), SPEC).unwrap();
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "the_same_ptx_whatever_lies_above", "--nocapture"]).current_dir(project).env(CHILD, project);
    if let Some(home) = home {
        child.env("CARGO_HOME", home);
    }
    let answer = child.output().unwrap();
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    fs::read_to_string(project.join("under_configuration.ptx")).unwrap()
}

#[test]
fn the_same_ptx_whatever_lies_above() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("configuration");
    if let Some(project) = env::var_os(CHILD) {
        let built = Kernels::from_spec("spec.toml").out_dir(project).build();
        built.unwrap_or_else(|error| panic!("{error}"));
        return;
    }
    let plain = build(&folder.join("plain"), None);
    let above = folder.join("above");
    fs::create_dir_all(above.join(".cargo")).unwrap();
    fs::write(above.join(".cargo/config.toml"), CONFIGURATION).unwrap();
    let home = folder.join("home");
    fs::create_dir_all(&home).unwrap();
    fs::write(home.join("config.toml"), CONFIGURATION).unwrap();
    let user = env::var_os("CARGO_HOME").map_or_else(|| env::home_dir().unwrap().join(".cargo"), PathBuf::from);
    for shared in ["registry", "git"] {
        let _ = fs::remove_file(home.join(shared));
        #[cfg(unix)]
        std::os::unix::fs::symlink(user.join(shared), home.join(shared)).unwrap();
    }
    assert!(plain == build(&above.join("project"), None), "a configuration above the project changes the PTX");
    assert!(plain == build(&folder.join("plain"), Some(&home)), "the configuration in CARGO_HOME changes the PTX");
    assert!(!above.join("project/elsewhere").exists());
}
