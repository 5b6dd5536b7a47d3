//! What is said when the sources of the kernels are not where they should be.

use std::env;
use std::process::Command;

use framestride_builder::toolchain::Inventory;
use framestride_builder::{BuildError, Kernels, Spec};

/// Set for a child of the test, which looks for the sources that its environment names.
const CHILD: &str = "FRAMESTRIDE_TEST_WITHOUT_SOURCES";

#[test]
fn sources_that_are_missing_are_said_to_be() {
    if env::var_os(CHILD).is_some() {
        let inventory = Inventory::new();
        let sources = inventory.findings.iter().find(|finding| finding.tool == "sources").unwrap();
        assert!(!inventory.can_build() && sources.required && sources.path.is_none());
        let text = inventory.to_string();
        assert!(text.contains("MISSING sources") && text.contains("/nowhere"), "{text}");
        let spec = include_str!("fixtures/user/shapes/my_model.toml");
        let error = Kernels::from_parsed(&Spec::parse("my_model.toml", spec).unwrap()).build().unwrap_err();
        assert!(matches!(error, BuildError::NoSource { .. }), "{error}");
        return;
    }
    let sources = Inventory::new().findings.into_iter().find(|finding| finding.tool == "sources").unwrap();
    assert!(sources.path.is_some_and(|path| path.join("src/attention").is_dir()) && sources.mend.is_none());
    let mut child = Command::new(env::current_exe().unwrap());
    child
        .args(["--exact", "sources_that_are_missing_are_said_to_be"])
        .env(CHILD, "1")
        .env("FRAMESTRIDE_SOURCE", "/nowhere");
    let answer = child.output().unwrap();
    assert!(
        answer.status.success(),
        "{}{}",
        String::from_utf8_lossy(&answer.stdout),
        String::from_utf8_lossy(&answer.stderr)
    );
}
