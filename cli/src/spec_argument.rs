//! The argument SPEC: the name of a shipped spec, or a TOML file.

use std::path::Path;

use framestride::shapes::models;
use framestride::shapes::spec::{Spec, similar_models};
use framestride::{Error, Result};

/// Reads the spec that an argument names. A file is opened once, so that it may be a pipe.
pub fn read_spec(argument: &str) -> Result<Spec> {
    if models().iter().any(|(name, _)| *name == argument) {
        return Ok(Spec::shipped(argument)?);
    }
    Spec::from_file(argument).map_err(|error| {
        if Path::new(argument).exists() {
            return Error::from(error);
        }
        Error::input(
            format!("spec {argument}"),
            "no file, and no shipped spec of this name",
            "a TOML file, or the name of a shipped spec",
            if argument.ends_with(".toml") { "Check the path".into() } else { similar_models(argument) },
        )
    })
}
