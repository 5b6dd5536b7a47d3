//! What a command found, and how it ends.

use framestride::Error;
use serde::Serialize;
use serde_json::Value;

/// What a command found: text for people, a value for machines, and whether its checks passed.
pub struct Outcome {
    /// What is printed without `--json`.
    pub text: String,
    /// What is printed with `--json`.
    pub json: Value,
    /// Whether all checks passed.
    pub ok: bool,
    /// Whether standard output holds a file that the command wrote. Then `text` or `json` go to
    /// standard error.
    pub aside: bool,
    /// Why a file could not be written after the work was done.
    pub unwritten: Option<Error>,
}

impl Outcome {
    /// An outcome that goes to standard output. Every file was written.
    pub fn new(text: String, json: Value, ok: bool) -> Outcome {
        Outcome { text, json, ok, aside: false, unwritten: None }
    }
}

/// A report as JSON.
pub fn to_json(value: &impl Serialize) -> Value {
    // Reports hold strings, numbers and lists of them, and JSON can hold all of these.
    serde_json::to_value(value).unwrap_or(Value::Null)
}
