//! `framestride plot`: a picture of a spec's masks.

use std::path::{Path, PathBuf};

use clap::Args;
use framestride::Result;
use framestride::shapes::layout::HeadType;
use framestride_pictures::masks;
use serde_json::json;

use crate::outcome::Outcome;
use crate::output::Output;
use crate::progress::Bar;
use crate::spec_argument::read_spec;

/// Draws the masks of a spec in model order and in packed order.
#[derive(Args)]
pub struct Plot {
    /// The spec.
    spec: String,
    /// The PNG file.
    #[arg(long)]
    out: PathBuf,
}

/// Draws masks.
pub fn plot(Plot { spec: argument, out }: Plot) -> Result<Outcome> {
    let spec = read_spec(&argument)?;
    let out = Output::new(&out, &[Path::new(&argument)])?;
    let bar = Bar::new();
    bar.say("drawing masks", None);
    out.write_picture(&masks::picture(&spec, &HeadType::ALL))?;
    drop(bar);
    let file = out.path().display().to_string();
    let outcome = Outcome::new(format!("wrote {file}\n"), json!({ "files": [file] }), true);
    Ok(Outcome { aside: out.is_stdout(), ..outcome })
}
