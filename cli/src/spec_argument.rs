//! The argument SPEC: the name of a shipped spec, or a TOML file.

use std::path::Path;

use framestride::shapes::models;
use framestride::shapes::spec::Spec;
use framestride::shapes::text::nearest;
use framestride::{Error, Result};

/// Reads the spec that an argument names. A file is opened once, so that it may be a pipe.
pub fn read_spec(argument: &str) -> Result<Spec> {
    if let Some((name, text)) = models().iter().find(|(name, _)| *name == argument) {
        return Ok(Spec::parse(&format!("{name} (shipped)"), text)?);
    }
    Spec::from_file(argument).map_err(|error| {
        if Path::new(argument).exists() {
            return Error::from(error);
        }
        let names: Vec<&str> = models().iter().map(|(name, _)| *name).collect();
        let mend = nearest(argument, names.iter().copied()).map(|name| format!("Did you mean {name}?"));
        Error::input(
            format!("spec {argument}"),
            "no file, and no shipped spec of this name",
            format!("a TOML file, or one of {}", names.join(", ")),
            mend.unwrap_or("Check the path".into()),
        )
    })
}
