//! What stands beside a PTX file, as JSON. It is everything that is needed to launch the kernels,
//! and what they were made from.
//!
//! ```json
//! {
//!   "format": 3,
//!   "name": "demo",
//!   "spec": "name = \"demo\"\n...",
//!   "arch": "sm_90a",
//!   "compiler": { "rustc": "1.96.0 (...)", "llvm": "22.1.2" },
//!   "ptx_sha256": "64 hexadecimal digits",
//!   "kernels": [
//!     {
//!       "entry": "attention", "threads": 384, "min_blocks": 1, "shared_bytes": 213248,
//!       "params_bytes": 104,
//!       "params": [{ "name": "params", "type": "AttentionParams", "offset": 0, "bytes": 104 }],
//!       "ptxas": {
//!         "registers": 168, "stack": 0, "spill_stores": 0, "spill_loads": 0, "messages": []
//!       }
//!     }
//!   ],
//!   "densities": { "dense": 1.0, "spatial": 0.3, "temporal": 0.3 },
//!   "workspace_bytes": 12345
//! }
//! ```
//!
//! The reader is strict. An unknown field, a missing one, another format and a value that
//! contradicts another are errors.
//!
//! The PTX itself says what it was made for. Its first line, a comment, repeats name, spec, family,
//! kernels and what follows from them ([`Manifest::statement`]). So a manifest that says something
//! else is found out ([`Manifest::mismatch`]). This matters because kernels know their shape as
//! constants, and would read beyond the tensors of another.

use core::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::arch::Arch;
use crate::layout::HeadType;
use crate::spec::{Spec, SpecError};
use crate::text::plain;

/// The format that this version writes and reads.
pub const FORMAT: u32 = 3;

/// A PTX file's manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Name of the spec, and of the two files.
    pub name: String,
    /// The spec's TOML text. It is `null` for a device crate without attention kernels.
    #[serde(deserialize_with = "Option::deserialize")]
    pub spec: Option<String>,
    /// The family that the kernels were made for, such as `sm_90a`.
    pub arch: String,
    /// What made the PTX.
    pub compiler: Compiler,
    /// SHA-256 of the PTX file, 64 lower-case hexadecimal digits.
    pub ptx_sha256: String,
    /// The kernels, in the order of the PTX.
    pub kernels: Vec<KernelResources>,
    /// Exact densities of the head types. It is `null` without a spec.
    #[serde(deserialize_with = "Option::deserialize")]
    pub densities: Option<Densities>,
    /// Bytes of the workspace for the spec's own batch and heads, with the keys profiled in one
    /// part. [`Spec::workspace`] gives others. It is `null` without a spec.
    #[serde(deserialize_with = "Option::deserialize")]
    pub workspace_bytes: Option<u64>,
}

/// Versions of the device compiler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compiler {
    /// Version and commit of rustc.
    pub rustc: String,
    /// Version of LLVM.
    pub llvm: String,
}

/// One kernel's launch table and resources.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelResources {
    /// Name of the entry in the PTX.
    pub entry: String,
    /// Threads of a block.
    pub threads: u32,
    /// Blocks that a multiprocessor must be able to hold.
    pub min_blocks: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Bytes of all parameters.
    pub params_bytes: u32,
    /// Parameters in order.
    pub params: Vec<Param>,
    /// What ptxas said; `null` where none was at hand.
    pub ptxas: Option<Ptxas>,
}

/// A kernel parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Param {
    /// Name in the source.
    pub name: String,
    /// Rust type: a primitive, or a block of [`crate::params`].
    #[serde(rename = "type")]
    pub ty: String,
    /// Byte offset in the parameter space.
    pub offset: u32,
    /// Size in bytes.
    pub bytes: u32,
}

/// Resources as ptxas reports them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ptxas {
    /// Registers of a thread.
    pub registers: u32,
    /// Stack frame in bytes.
    pub stack: u32,
    /// Bytes of spill stores.
    pub spill_stores: u32,
    /// Bytes of spill loads.
    pub spill_loads: u32,
    /// Warnings and remarks, one a line.
    pub messages: Vec<String>,
}

/// Visible pairs over S², per head type.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Densities {
    /// 1.
    pub dense: f64,
    /// Of spatial heads.
    pub spatial: f64,
    /// Of temporal heads.
    pub temporal: f64,
}

impl Densities {
    /// The densities of a spec.
    pub fn of(spec: &Spec) -> Densities {
        let [dense, spatial, temporal] = HeadType::ALL.map(|head| spec.density(head));
        Densities { dense, spatial, temporal }
    }
}

/// How the first line of a PTX begins.
const STATEMENT: &str = "// framestride ";

/// What a PTX says of itself: all of its manifest but what compilers and their versions say.
#[derive(Serialize)]
struct Statement<'a> {
    name: &'a str,
    spec: &'a Option<String>,
    arch: &'a str,
    kernels: Vec<KernelResources>,
    densities: Option<Densities>,
    workspace_bytes: Option<u64>,
}

/// Where a manifest and its PTX say different things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The field, as in `kernels, attention, min_blocks` or `spec, line 4`.
    pub place: String,
    /// What the manifest says.
    pub manifest: String,
    /// What the PTX says.
    pub ptx: String,
}

/// What is wrong with a manifest: the file, the place and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The file, as the reader was given it.
    pub file: String,
    /// What is wrong, with line and column where it has them.
    pub message: String,
}

impl std::error::Error for ManifestError {}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (file, message) = (plain(&self.file, 300), plain(&self.message, 1000));
        write!(f, "{file}: {message}; rebuild it with `framestride build`")
    }
}

impl Manifest {
    /// Reads and checks a manifest. `file` is only what errors call it.
    pub fn parse(file: &str, text: &str) -> Result<Manifest, ManifestError> {
        let fail = |message: String| ManifestError { file: file.into(), message };
        // Another format has other fields: it is told apart before they are looked at.
        let value: Value =
            serde_json::from_str(text).map_err(|error| fail(format!("is not a JSON manifest: {error}")))?;
        match value.get("format").and_then(Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(format) => return Err(fail(format!("has format {format}, and this version reads {FORMAT}"))),
            None => return Err(fail(format!("has no format number, and this version reads {FORMAT}"))),
        }
        let manifest: Manifest =
            serde_json::from_str(text).map_err(|error| fail(format!("is not a manifest: {error}")))?;
        match manifest.contradiction() {
            Some(message) => Err(fail(message)),
            None => Ok(manifest),
        }
    }

    /// The manifest as indented JSON with a newline at its end, as it stands in the file.
    pub fn to_json(&self) -> String {
        // Numbers, strings and structures of them always have a JSON form. A NaN density would be
        // written as null.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The spec, read again. Without one the error lists the keys that a spec must have.
    pub fn spec(&self) -> Result<Spec, SpecError> {
        Spec::parse(&format!("{} (in its manifest)", self.name), self.spec.as_deref().unwrap_or_default())
    }

    /// The kernel of an entry.
    pub fn kernel(&self, entry: &str) -> Option<&KernelResources> {
        self.kernels.iter().find(|kernel| kernel.entry == entry)
    }

    /// The first line of the PTX, a comment in ASCII without its line end.
    pub fn statement(&self) -> String {
        let mut line = STATEMENT.to_string();
        // The only characters beyond ASCII stand in strings, which have an escape for them.
        for character in serde_json::to_string(&self.stated()).unwrap_or_default().chars() {
            if character.is_ascii() && !character.is_ascii_control() {
                line.push(character);
            } else {
                let units =
                    character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect::<String>();
                line += &units;
            }
        }
        line
    }

    /// The first thing that this manifest and a PTX's first line say differently, if any.
    pub fn mismatch(&self, ptx: &str) -> Option<Mismatch> {
        let line = ptx.lines().next().and_then(|line| line.strip_prefix(STATEMENT));
        match line.and_then(|line| serde_json::from_str(line).ok()) {
            // Numbers, strings and structures of them always have a JSON form.
            Some(stated) => mismatch("", &serde_json::to_value(self.stated()).unwrap_or_default(), &stated),
            None => Some(Mismatch {
                place: "first line of the PTX".into(),
                manifest: "a spec and launch tables".into(),
                ptx: "none of them: another version made it".into(),
            }),
        }
    }

    fn stated(&self) -> Statement<'_> {
        Statement {
            name: &self.name,
            spec: &self.spec,
            arch: &self.arch,
            kernels: self.kernels.iter().map(|kernel| KernelResources { ptxas: None, ..kernel.clone() }).collect(),
            densities: self.densities,
            workspace_bytes: self.workspace_bytes,
        }
    }

    /// Why the fields cannot all be right.
    fn contradiction(&self) -> Option<String> {
        let digest = &self.ptx_sha256;
        if digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            return Some(format!("ptx_sha256 is {digest:?}, not 64 lower-case hexadecimal digits"));
        }
        let most_threads = Arch::named(&self.arch).unwrap_or_default().block_threads;
        for (i, kernel) in self.kernels.iter().enumerate() {
            let entry = &kernel.entry;
            if self.kernels[..i].iter().any(|other| other.entry == *entry) {
                return Some(format!("kernel {entry:?} stands twice"));
            }
            if !(1..=most_threads).contains(&kernel.threads) {
                return Some(format!("kernel {entry:?} has {} threads, not 1 to {most_threads}", kernel.threads));
            }
            let mut end = 0;
            for param in &kernel.params {
                let next = param.offset.checked_add(param.bytes);
                match next {
                    Some(next) if param.offset >= end && next <= kernel.params_bytes => end = next,
                    _ => {
                        return Some(format!(
                            "parameter {:?} of kernel {entry:?} takes bytes {} to {}, outside those left of {}",
                            param.name,
                            param.offset,
                            u64::from(param.offset) + u64::from(param.bytes),
                            kernel.params_bytes
                        ));
                    }
                }
            }
        }
        None
    }
}

/// The first difference of two values at `place`.
fn mismatch(place: &str, manifest: &Value, ptx: &Value) -> Option<Mismatch> {
    let within = |part: &str| if place.is_empty() { part.to_string() } else { format!("{place}, {part}") };
    let differ = |place: String, manifest: String, ptx: String| Some(Mismatch { place, manifest, ptx });
    match (manifest, ptx) {
        _ if manifest == ptx => None,
        (Value::Object(fields), Value::Object(others)) => {
            let names = fields.keys().chain(others.keys());
            names.into_iter().find_map(|name| mismatch(&within(name), &manifest[name], &ptx[name]))
        }
        (Value::Array(items), Value::Array(others)) if items.len() == others.len() => {
            // Kernels and parameters have names.
            let name = |item: &Value| item["entry"].as_str().or(item["name"].as_str()).unwrap_or("item").to_string();
            items.iter().zip(others).find_map(|(item, other)| mismatch(&within(&name(other)), item, other))
        }
        (Value::Array(items), Value::Array(others)) => {
            differ(place.into(), format!("{} of them", items.len()), format!("{} of them", others.len()))
        }
        (Value::String(text), Value::String(other)) if text.contains('\n') || other.contains('\n') => {
            let (mut lines, mut others) = (text.split('\n'), other.split('\n'));
            let shown = |line: Option<&str>| line.map_or("no such line".to_string(), |line| format!("{line:?}"));
            for number in 1.. {
                let (line, other) = (lines.next(), others.next());
                if line != other || line.is_none() {
                    return differ(within(&format!("line {number}")), shown(line), shown(other));
                }
            }
            None
        }
        _ => differ(place.into(), manifest.to_string(), ptx.to_string()),
    }
}
