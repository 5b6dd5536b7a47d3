//! What the tests share: the library, compilers, and programs that are run.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A folder for what the tests make.
pub fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The folder of the shared and of the static library, and of xtask, built by the first test that
/// asks. Cargo builds none of them for the tests of a package.
///
/// Beside the whole workspace and its examples, dependencies have the features that they have for
/// `cargo test --workspace`. For this package alone they would be compiled again.
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let target = folder().parent().unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args(["build", "--quiet", "--locked", "--workspace", "--lib", "--bins", "--examples", "--target-dir"])
            .arg(target);
        succeeds(&mut cargo);
        target.join("debug")
    })
}

/// Compiles a program of this crate as strictly as compilers can, and links the shared library, or
/// with `-static-library` the static one.
pub fn compile(source: &str, options: &[&str]) -> PathBuf {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (compiler, standard) = if source.ends_with(".cpp") { ("c++", "-std=c++17") } else { ("cc", "-std=c11") };
    let statically = options.contains(&"-static-library");
    let stem = Path::new(source).file_stem().unwrap().to_str().unwrap();
    let program = folder().join(format!("{stem}{}", if statically { "_static" } else { "" }));
    let library = library();
    let mut command = tool(compiler);
    command.args([standard, "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-o"]).arg(&program);
    command.arg("-I").arg(crate_folder.join("include")).arg(crate_folder.join(source));
    if statically {
        command.arg(library.join("libframestride.a")).args(["-lgcc_s", "-lm", "-lpthread", "-ldl"]);
    } else {
        command.arg("-L").arg(library).args(["-lframestride", "-ldl"]).arg(format!("-Wl,-rpath,{}", library.display()));
    }
    command.args(options.iter().filter(|&&option| option != "-static-library"));
    succeeds(&mut command);
    program
}

/// A tool that `cargo xtask test` installs where it is missing.
pub fn tool(name: &str) -> Command {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(name).is_file()));
    assert!(found, "{name} is missing: cargo xtask test installs it");
    Command::new(name)
}

/// A program that runs in the tests' folder.
pub fn run(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder());
    command
}

/// Runs a command that must succeed, and returns what it prints.
pub fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [said, complained] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{command:?}: {}\n{said}{complained}", output.status);
    said.into_owned()
}
