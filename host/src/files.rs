//! Tensors in safetensors files.
//!
//! | tensor | shape | type |
//! | --- | --- | --- |
//! | `q`, `k`, `v` | \[B, S, H, D\] | bf16, f16 or f32; rounded to the spec's type |
//! | `cos`, `sin` | \[rows, D / 2\], or \[rows, H, D / 2\] with tables per head | bf16, f16 or f32; made from the grid when not given |
//! | `q_norm.weight`, `k_norm.weight`, `q_norm.bias`, `k_norm.bias` | \[D\], or \[H D\] when the norm is over all heads | likewise |
//! | `q_norm_text.weight`, ... | likewise, for text rows; the video's when not given | likewise |
//! | `text_lengths` | \[B\], valid text tokens | u8, i32, u32 or i64 |
//!
//! The output is written as `out`, \[B, S, H, D\] in the spec's type, to a new file that takes its place when it is complete.

use std::path::Path;

use framestride_shapes::spec::{Dtype, Spec};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Stored, SafeTensors};

use crate::error::{Error, Result};
use crate::inputs::{Inputs, Norm, RopeTables, Tokens, narrow};

/// An open file.
struct File<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::file(path, error))
}

impl<'a> File<'a> {
    fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<File<'a>> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| {
            Error::input(
                path.display(),
                format!("{} bytes that do not parse ({error})", bytes.len()),
                "a whole safetensors file",
                "It is another kind of file, or was cut short: write it again",
            )
        })?;
        Ok(File { path, tensors })
    }

    fn subject(&self, key: &str) -> String {
        format!("{}, tensor {key}", self.path.display())
    }

    fn find(&self, key: &str) -> Option<TensorView<'_>> {
        self.tensors.tensor(key).ok()
    }

    fn need(&self, key: &str) -> Result<TensorView<'_>> {
        self.find(key).ok_or_else(|| {
            let mut names = self.tensors.names();
            names.sort_unstable();
            Error::input(
                self.subject(key),
                format!(
                    "no such tensor; the file has {}",
                    if names.is_empty() { "none".into() } else { names.join(", ") }
                ),
                "a tensor of this name",
                "Store it under this name",
            )
        })
    }

    fn wrong_type(&self, key: &str, found: Stored, allowed: &str) -> Error {
        Error::input(self.subject(key), format!("type {found:?}"), allowed, "Convert it before storing it")
    }

    /// Elements as f32.
    fn floats(&self, key: &str, view: &TensorView) -> Result<Vec<f32>> {
        let halves = |convert: fn(u16) -> f32| -> Vec<f32> {
            view.data().as_chunks().0.iter().map(|&bytes| convert(u16::from_le_bytes(bytes))).collect()
        };
        match view.dtype() {
            Stored::F32 => Ok(view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()),
            Stored::BF16 => Ok(halves(|bits| bf16::from_bits(bits).to_f32())),
            Stored::F16 => Ok(halves(|bits| f16::from_bits(bits).to_f32())),
            other => Err(self.wrong_type(key, other, "BF16, F16 or F32")),
        }
    }

    fn tokens(&self, key: &str, spec: &Spec) -> Result<Tokens> {
        let view = self.need(key)?;
        let (rows, head_dim) = (spec.layout.sequence() as usize, spec.head_dim as usize);
        let &[batch, found_rows, heads, found_dim] = view.shape() else {
            return Err(self.wrong_shape(key, view.shape(), spec));
        };
        if (found_rows, found_dim) != (rows, head_dim) {
            return Err(self.wrong_shape(key, view.shape(), spec));
        }
        let bits = match (view.dtype(), spec.dtype) {
            (Stored::BF16, Dtype::Bf16) | (Stored::F16, Dtype::F16) => {
                view.data().as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect()
            }
            _ => self.floats(key, &view)?.into_iter().map(|value| narrow(spec.dtype, value.into())).collect(),
        };
        Ok(Tokens { dtype: spec.dtype, batch, rows, heads, head_dim, bits })
    }

    fn wrong_shape(&self, key: &str, found: &[usize], spec: &Spec) -> Error {
        Error::input(
            self.subject(key),
            format!("shape {found:?}"),
            format!("[batch, {}, heads, {}] for spec {}", spec.layout.sequence(), spec.head_dim, spec.name),
            "Store it as [B, S, H, D] in the model's order, or give the spec of this model",
        )
    }

    fn norm(&self, key: &str) -> Result<Option<Norm>> {
        let part = |part: &str| -> Result<Option<Vec<f32>>> {
            let key = format!("{key}.{part}");
            self.find(&key).map(|view| self.floats(&key, &view)).transpose()
        };
        let norm = Norm { weight: part("weight")?, bias: part("bias")? };
        Ok((norm != Norm::default()).then_some(norm))
    }

    fn lengths(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(view) = self.find(key) else { return Ok(None) };
        let data = view.data();
        let values: Vec<i64> = match view.dtype() {
            Stored::U8 => data.iter().map(|&byte| byte.into()).collect(),
            Stored::I32 => data.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect(),
            Stored::U32 => data.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes).into()).collect(),
            Stored::I64 => data.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
            other => return Err(self.wrong_type(key, other, "U8, I32, U32 or I64")),
        };
        let lengths = values.iter().map(|&value| u32::try_from(value)).collect::<Result<_, _>>().map_err(|_| {
            Error::input(
                self.subject(key),
                format!("{values:?}"),
                "lengths of 0 or more",
                "A length counts the valid text tokens of a batch item",
            )
        })?;
        Ok(Some(lengths))
    }
}

/// Q, K, V and what else the file gives, checked against the spec. RoPE tables come from the grid when the file has none.
pub fn load_inputs(path: &Path, spec: &Spec) -> Result<Inputs> {
    let bytes = read(path)?;
    let file = File::parse(path, &bytes)?;
    let q = file.tokens("q", spec)?;
    let table_shape = RopeTables::shape(spec, q.heads);
    let tables = |key: &str| -> Result<Option<Vec<f32>>> {
        let Some(view) = file.find(key) else { return Ok(None) };
        if spec.rope.is_some() && view.shape() != table_shape {
            return Err(Error::input(
                file.subject(key),
                format!("shape {:?}", view.shape()),
                format!("shape {table_shape:?}"),
                "The rows are the video rows, or all rows with rope.text = true; one table a head with rope.per_head = true",
            ));
        }
        file.floats(key, &view).map(Some)
    };
    let rope = match (tables("cos")?, tables("sin")?) {
        (Some(cos), Some(sin)) => Some(RopeTables { cos, sin }),
        (None, None) => spec.rope.as_ref().map(|_| RopeTables::from_grid(spec, q.heads)),
        (Some(_), None) => return Err(only_one(&file, "sin", "cos")),
        (None, Some(_)) => return Err(only_one(&file, "cos", "sin")),
    };
    let inputs = Inputs {
        k: file.tokens("k", spec)?,
        v: file.tokens("v", spec)?,
        q,
        q_norm: file.norm("q_norm")?.unwrap_or_default(),
        k_norm: file.norm("k_norm")?.unwrap_or_default(),
        q_norm_text: file.norm("q_norm_text")?,
        k_norm_text: file.norm("k_norm_text")?,
        rope,
        text_lengths: file.lengths("text_lengths")?,
        scale: None,
    };
    inputs.check(spec, &path.display().to_string())?;
    Ok(inputs)
}

fn only_one(file: &File, missing: &str, given: &str) -> Error {
    Error::input(file.subject(missing), format!("only {given}"), "both tables or neither", "Store the other table too")
}

/// Frames of a video: `[frames, height, width]` RGB pixels.
pub struct Frames {
    /// Frames.
    pub count: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// RGB bytes.
    pub pixels: Vec<u8>,
}

/// The tensor `frames`, u8 \[frames, height, width, 3\].
pub fn load_frames(path: &Path) -> Result<Frames> {
    let bytes = read(path)?;
    let file = File::parse(path, &bytes)?;
    let view = file.need("frames")?;
    if view.dtype() != Stored::U8 {
        return Err(file.wrong_type("frames", view.dtype(), "U8"));
    }
    match *view.shape() {
        [count, height, width, 3] if count * height * width > 0 => {
            Ok(Frames { count, height, width, pixels: view.data().to_vec() })
        }
        _ => Err(Error::input(
            file.subject("frames"),
            format!("shape {:?}", view.shape()),
            "[frames, height, width, 3], none of them 0",
            "Store RGB frames, one behind the other",
        )),
    }
}

/// Writes `out` (and `lse`, \[B, H, S\], where there is one). The file appears when it is complete.
pub fn save_output(path: &Path, out: &Tokens, lse: Option<&[f32]>) -> Result<()> {
    let dtype = match out.dtype {
        Dtype::Bf16 => Stored::BF16,
        Dtype::F16 => Stored::F16,
    };
    let out_bytes: Vec<u8> = out.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let lse_bytes: Vec<u8> = lse.unwrap_or_default().iter().flat_map(|value| value.to_le_bytes()).collect();
    let invalid = |error| Error::file(path, std::io::Error::other(error));
    let mut tensors = vec![("out", TensorView::new(dtype, out.shape().to_vec(), &out_bytes).map_err(invalid)?)];
    if lse.is_some() {
        let shape = vec![out.batch, out.heads, out.rows];
        tensors.push(("lse", TensorView::new(Stored::F32, shape, &lse_bytes).map_err(invalid)?));
    }
    let bytes = safetensors::serialize(tensors, None).map_err(invalid)?;
    write_atomically(path, &bytes)
}

/// Writes a file beside its place and moves it there, so that nobody sees half of it.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        // Readable as any new file is; what is secret is kept so by the process' umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(folder)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|error| Error::file(path, error))
}
