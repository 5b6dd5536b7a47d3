//! README.md, followed as a reader would: what it shows is written to files, and its commands are
//! run.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{succeeds, tool};

#[test]
fn every_program_and_command_works() {
    for name in ["cc", "pkg-config", "cmake", "meson"] {
        tool(name);
    }
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(checkout.join("capi/README.md")).unwrap();
    let home = tempfile::tempdir().unwrap();
    let xtask = common::library().join("xtask");
    let (mut files, mut commands) = (0, 0);
    // Every second part lies between fences: its language, then its lines.
    for block in page.split("```").skip(1).step_by(2) {
        let (language, text) = block.split_once('\n').unwrap();
        let file = match language {
            "c" => "layer.c",
            "cmake" => "CMakeLists.txt",
            "meson" => "meson.build",
            "console" => {
                let lines: Vec<&str> = text.lines().map(|line| line.strip_prefix("$ ").unwrap()).collect();
                let mut shell = Command::new("sh");
                shell.arg("-ec");
                match lines[..] {
                    // A release build takes a minute, and xtask alone half of one. The tests have
                    // built library and xtask already.
                    [install] if install.starts_with("cargo xtask install-c ") => {
                        let line = install.replace("cargo xtask", xtask.to_str().unwrap());
                        let line = line.replace('~', &home.path().display().to_string());
                        shell.arg(format!("{line} --debug")).current_dir(&checkout);
                    }
                    _ => {
                        shell.arg(lines.join("\n")).env("HOME", home.path()).current_dir(home.path());
                    }
                }
                let said = succeeds(&mut shell);
                commands += lines.len();
                assert!(lines.len() == 1 || said.contains("a mean of ones is one"), "{text}{said}");
                continue;
            }
            other => panic!("a block of `{other}`"),
        };
        fs::write(home.path().join(file), text).unwrap();
        files += 1;
    }
    assert_eq!((files, commands), (3, 12));
}
