//! One call: what is checked of its tensors, what it allocates, and the launch.

use std::fmt::Display;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{DType, Error, Layout, Result, Shape, Storage, StorageRef, Tensor};
use framestride::shapes::dtype::Dtype;
use framestride::shapes::params::{NormWeights, Tensor as Rows};
use framestride::shapes::spec::NormKind;
use framestride::shapes::workspace::ALIGNMENT;
use framestride::{Found, Layer, SparseAttention, Spec, Workspace};

use crate::attention::{Attention, HeadTypes, Norm, Text};
use crate::place::Place;

/// Q, K or V of a call.
pub(crate) type Given<'a, P> = (&'a <P as BackendDevice>::Storage, &'a Layout);

/// A tensor that a call has made: its storage, which is contiguous, and its shape.
pub(crate) type Made<P> = (<P as BackendDevice>::Storage, Shape);

/// What a call has made.
pub(crate) struct Launched<P: BackendDevice> {
    pub out: Made<P>,
    pub lse: Made<P>,
    /// Types and errors of the heads, when the call profiles them.
    pub found: Option<[Made<P>; 2]>,
    /// Precisions of the heads and their errors, when the call finds them.
    pub judged: Option<[Made<P>; 2]>,
}

/// A call while its tensors are checked.
pub(crate) struct Call<'a, P> {
    attention: &'a Attention,
    place: &'a P,
    /// The tensors that are read besides Q, K and V. While they are here, nobody writes them.
    read: Vec<StorageRef<'a>>,
}

impl<'a, P: Place> Call<'a, P> {
    pub fn new(attention: &'a Attention, place: &'a P) -> Call<'a, P> {
        Call { attention, place, read: Vec::new() }
    }

    /// Launches the call. Whatever is wrong with it is an error, and then nothing was launched.
    pub fn launch(mut self, qkv: [Given<P>; 3]) -> Result<Launched<P>> {
        let (attention, place) = (self.attention, self.place);
        let (module, device) = (&attention.kernels.module, &attention.kernels.device);
        if !place.is_of(device) {
            let (found, allowed) = (place.location(), device.location());
            let allowed = format!("tensors of {allowed:?}, where the kernels were loaded");
            return refused(
                "device",
                format!("tensors of {found:?}"),
                allowed,
                "Load them on the device of the tensors",
            );
        }
        let spec = module.spec();
        let [(_, q_layout), ..] = qkv;
        let (batch, heads) = match *q_layout.dims() {
            [batch, _, heads, _] => (batch, heads),
            _ => (spec.batch as usize, spec.heads as usize),
        };
        let (sequence, head_dim) = (spec.layout.sequence() as usize, spec.head_dim as usize);
        let sides = [
            ("before", &attention.before, spec.layout.before as usize),
            ("after", &attention.after, spec.layout.after as usize),
        ];
        let apart: usize = sides.iter().filter(|(_, text, _)| text.qkv.is_some()).map(|(_, _, tokens)| tokens).sum();
        let shape = |rows: usize| [batch, rows, heads, head_dim];
        let plan = SparseAttention::new(module, saturated(batch), saturated(heads)).map_err(Error::wrap)?;
        let rows = |name: &str, (storage, layout)| self.rows(name, storage, layout, shape(sequence - apart));
        let [q, k, v] = [rows("q", qkv[0])?, rows("k", qkv[1])?, rows("v", qkv[2])?];

        let q_norm = self.norm("q_norm", &attention.q_norm, heads)?;
        let k_norm = self.norm("k_norm", &attention.k_norm, heads)?;
        let [before, after] = sides.map(|(name, text, tokens)| self.text(name, text, shape(tokens)));
        let (before, after) = (before?, after?);
        let mut layer = Layer { q, k, v, q_norm, k_norm, before, after, ..Layer::default() };
        let tables: Vec<usize> =
            spec.rope_table_shape(saturated(heads)).into_iter().map(|extent| extent as usize).collect();
        match (&attention.rope, &spec.rope) {
            (Some(rope), Some(_)) => {
                let (cos, cos_batch) = self.table("rope.cos", &rope.cos, batch, &tables)?;
                let (sin, sin_batch) = self.table("rope.sin", &rope.sin, batch, &tables)?;
                if cos_batch != sin_batch {
                    let found = format!("{cos_batch} and {sin_batch} elements from one batch item to the next");
                    return refused("rope", found, "the same for cosines and sines", "Give both in one layout");
                }
                (layer.cos, layer.sin, layer.rope_batch) = (cos, sin, cos_batch);
            }
            (None, Some(_)) => {
                let allowed = format!("cosines and sines, {tables:?} for spec {}", spec.name);
                return refused("rope", "nothing", allowed, "Set Attention::rope");
            }
            (Some(_), None) => return not_in_spec("rope", spec, "RoPE", "[rope]"),
            (None, None) => {}
        }
        (layer.half_widths, layer.scale, layer.seed) = (attention.half_widths, attention.scale, attention.seed);
        let types = match &attention.head_types {
            HeadTypes::Profiled => framestride::HeadTypes::Profiled,
            HeadTypes::Dense => framestride::HeadTypes::Dense,
            HeadTypes::Given(types) => {
                framestride::HeadTypes::Given(self.words("head_types", types, DType::U32, &[batch, heads])?)
            }
        };

        if let Some(precisions) = &attention.precisions {
            if spec.largest_error.is_none() {
                return not_in_spec("precisions", spec, "heads of both precisions", "[precision]");
            }
            layer.precisions = self.words("precisions", precisions, DType::U32, &[batch, heads])?;
        }

        let make = |dims: &[usize], dtype: DType| -> Result<Made<P>> {
            let shape = Shape::from(dims);
            // SAFETY: kernels write every element before anybody reads it.
            Ok((unsafe { place.alloc_uninit(&shape, dtype)? }, shape))
        };
        let mut out = make(&shape(sequence), self.dtype())?;
        layer.out = Rows { data: place.written(&mut out.0), ..contiguous_rows(shape(sequence)) };
        let mut lse = make(&[batch, heads, sequence], DType::F32)?;
        layer.lse = place.written(&mut lse.0);
        let (mut found, mut judged) = (None, None);
        if types == framestride::HeadTypes::Profiled {
            let mut both = [make(&[batch, heads], DType::U32)?, make(&[batch, heads, 2], DType::F32)?];
            let [head_types, errors] = both.each_mut().map(|(storage, _)| place.written(storage));
            layer.found = Found { head_types, errors, ..Found::default() };
            found = Some(both);
            if spec.largest_error.is_some() && attention.precisions.is_none() {
                let mut both = [make(&[batch, heads], DType::U32)?, make(&[batch, heads], DType::F32)?];
                [layer.found.precisions, layer.found.precision_errors] =
                    both.each_mut().map(|(storage, _)| place.written(storage));
                judged = Some(both);
            }
        }
        // The address of a workspace is a multiple of `ALIGNMENT`, which memory of the CPU need not
        // be.
        let bytes = plan.workspace_bytes();
        let mut memory = make(&[(bytes + ALIGNMENT) as usize], DType::U8)?;
        let address = place.written(&mut memory.0).next_multiple_of(ALIGNMENT);
        // SAFETY: the range lies in `memory`, which nobody else has.
        let workspace = unsafe { Workspace::borrow(module.device(), address, bytes) };

        // SAFETY: every address is memory of this device and large enough, since `rows` and `words`
        // have compared layouts with storages. On the CPU it is allocated in whole words, which the
        // emulator touches. What is read is locked until the launch, and candle frees memory in the
        // order of its streams. The kernels live as long as their work (`Kernels::drop`).
        let launched = unsafe { plan.forward(place.stream(), &layer, types, &workspace) };

        // Other streams now wait for the work, before they write what it reads or read what it
        // writes.
        for (storage, _) in qkv {
            place.read(storage);
        }
        for storage in self.read.iter().filter_map(|storage| place.own(storage)) {
            place.read(storage);
        }
        let all_found = found.iter_mut().chain(&mut judged).flatten();
        for (storage, _) in [&mut out, &mut lse, &mut memory].into_iter().chain(all_found) {
            place.written(storage);
        }
        launched.map_err(Error::wrap)?;
        Ok(Launched { out, lse, found, judged })
    }

    /// The element type of Q, K, V and the output.
    fn dtype(&self) -> DType {
        match self.attention.spec().dtype {
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
        }
    }

    /// Checks rows of Q, K or V, \[B, S, H, D\].
    fn rows(&self, name: &str, storage: &P::Storage, layout: &Layout, shape: [usize; 4]) -> Result<Rows> {
        let spec = self.attention.spec();
        if layout.dims() != shape {
            let allowed = format!("{shape:?}, [B, S, H, D] of spec {}", spec.name);
            let mend = "Give all the same B and H, and text rows once; transpose(1, 2) makes a view of [B, H, S, D]";
            return refused(name, format!("shape {:?}", layout.dims()), allowed, mend);
        }
        let &[batch, row, head, element] = layout.stride() else { unreachable!("a stride for each dimension") };
        if element != 1 {
            let found = format!("{element} elements from one element of a row to the next");
            return refused(name, found, "contiguous rows", "Call contiguous()");
        }
        let data = self.address(name, storage, layout, self.dtype())?;
        Ok(Rows { data, batch: batch as u64, row: row as u64, head: head as u64 })
    }

    /// Checks that a layout lies in its storage, which candle does not, and the type of its
    /// elements. Returns the address of the first one.
    fn address(&self, name: &str, storage: &P::Storage, layout: &Layout, dtype: DType) -> Result<u64> {
        if storage.dtype() != dtype {
            let allowed = format!("{dtype:?} for spec {}", self.attention.spec().name);
            return refused(name, format!("{:?}", storage.dtype()), allowed, "Call to_dtype()");
        }
        let (address, elements) = self.place.read(storage);
        let steps = layout.dims().iter().zip(layout.stride());
        let last = steps.map(|(&extent, &stride)| extent.saturating_sub(1).saturating_mul(stride));
        let needed = last.fold(layout.start_offset(), usize::saturating_add).saturating_add(1);
        if needed > elements {
            let (shape, strides, offset) = (layout.dims(), layout.stride(), layout.start_offset());
            let allowed = format!("at least {needed}, for shape {shape:?}, strides {strides:?} and offset {offset}");
            let mend = "Make the tensor with the shape that its storage has";
            return refused(name, format!("a storage of {elements} elements"), allowed, mend);
        }
        Ok(address + (layout.start_offset() * dtype.size_in_bytes()) as u64)
    }

    /// Checks a contiguous tensor of 4-byte words, and keeps it from being written.
    fn words(&mut self, name: &str, tensor: &'a Tensor, dtype: DType, shape: &[usize]) -> Result<u64> {
        if tensor.dims() != shape {
            let allowed = format!("{shape:?} for spec {}", self.attention.spec().name);
            return refused(name, format!("shape {:?}", tensor.dims()), allowed, "Give it this shape");
        }
        if !tensor.is_contiguous() {
            return refused(name, format!("strides {:?}", tensor.stride()), "a contiguous tensor", "Call contiguous()");
        }
        self.part(name, tensor, dtype)
    }

    /// Checks a tensor that is read besides Q, K and V, and keeps it from being written.
    fn part(&mut self, name: &str, tensor: &'a Tensor, dtype: DType) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let own = own(self.place, name, &storage)?;
        let address = self.address(name, own, layout, dtype)?;
        if dtype == DType::F32 && !address.is_multiple_of(16) {
            let found = format!("an offset of {} elements", layout.start_offset());
            return refused(name, found, "a multiple of 4, for reads of 16 bytes", "Call copy()");
        }
        self.read.push(storage);
        Ok(address)
    }

    /// Checks the affine part of a QK-norm.
    fn norm(&mut self, name: &str, norm: &'a Norm, heads: usize) -> Result<NormWeights> {
        let spec = self.attention.spec();
        let length = spec.norm_length(saturated(heads)) as usize;
        let mut address = |part: &str, tensor: &'a Option<Tensor>, is_in_spec: bool| match tensor {
            Some(tensor) if is_in_spec => self.words(&format!("{name}.{part}"), tensor, DType::F32, &[length]),
            Some(_) => not_in_spec(&format!("{name}.{part}"), spec, "QK-norm with it", "[qk_norm]"),
            None => Ok(0),
        };
        let kind = spec.qk_norm.as_ref().map(|norm| norm.kind);
        let weight = address("weight", &norm.weight, kind.is_some())?;
        Ok(NormWeights { weight, bias: address("bias", &norm.bias, kind == Some(NormKind::Layer))? })
    }

    /// Checks what is given of the text on a side. Its rows have `shape`.
    fn text(&mut self, name: &str, text: &'a Text, shape: [usize; 4]) -> Result<framestride::Text> {
        let [batch, tokens, heads, _] = shape;
        if tokens == 0 && text.qkv.is_some() {
            return not_in_spec(
                &format!("{name}.qkv"),
                self.attention.spec(),
                "text on this side",
                &format!("[{name}]"),
            );
        }
        let mut rows = |part: &str, tensor: &'a Tensor| {
            let (storage, layout) = tensor.storage_and_layout();
            let name = format!("{name}.{part}");
            let rows = self.rows(&name, own(self.place, &name, &storage)?, layout, shape)?;
            self.read.push(storage);
            Ok::<Rows, Error>(rows)
        };
        let qkv = match &text.qkv {
            Some([q, k, v]) => Some([rows("q", q)?, rows("k", k)?, rows("v", v)?]),
            None => None,
        };
        let mut norm = |part: &str, norm: &'a Option<Norm>| {
            norm.as_ref().map(|norm| self.norm(&format!("{name}.{part}"), norm, heads)).transpose()
        };
        let (q_norm, k_norm) = (norm("q_norm", &text.q_norm)?, norm("k_norm", &text.k_norm)?);
        let lengths = match &text.lengths {
            Some(lengths) => self.words(&format!("{name}.lengths"), lengths, DType::U32, &[batch])?,
            None => 0,
        };
        Ok(framestride::Text { qkv, lengths, q_norm, k_norm })
    }

    /// Checks a table of RoPE. Returns its address, and the elements from one batch item to the
    /// next.
    fn table(&mut self, name: &str, table: &'a Tensor, batch: usize, shape: &[usize]) -> Result<(u64, u64)> {
        match (table.dims(), table.stride()) {
            ([items, item @ ..], [stride, strides @ ..])
                if *items == batch && item == shape && Shape::from(item).is_contiguous(strides) =>
            {
                Ok((self.part(name, table, DType::F32)?, *stride as u64))
            }
            _ => Ok((self.words(name, table, DType::F32, shape)?, 0)),
        }
    }
}

/// The storage of a tensor on this device.
pub(crate) fn own<'a, P: Place>(place: &P, name: &str, storage: &'a Storage) -> Result<&'a P::Storage> {
    match place.own(storage) {
        Some(own) => Ok(own),
        None => {
            let (found, allowed) = (storage.device().location(), place.location());
            refused(name, format!("{found:?}"), format!("{allowed:?}, as for q"), "Call to_device()")
        }
    }
}

/// The strides of a contiguous \[B, S, H, D\].
fn contiguous_rows([_, rows, heads, head_dim]: [usize; 4]) -> Rows {
    let (row, head) = ((heads * head_dim) as u64, head_dim as u64);
    Rows { data: 0, batch: rows as u64 * row, row, head }
}

/// An extent as the library counts it. The largest is refused there, as is all that is larger.
fn saturated(extent: usize) -> u32 {
    u32::try_from(extent).unwrap_or(u32::MAX)
}

/// The error of what a spec does not have.
fn not_in_spec<T>(subject: &str, spec: &Spec, what: &str, table: &str) -> Result<T> {
    let allowed = format!("nothing: spec {} has no {what}", spec.name);
    refused(subject, "a tensor", allowed, &format!("Leave it out, or change {table} of the spec"))
}

/// The error of an argument.
pub(crate) fn refused<T>(subject: &str, found: impl Display, allowed: impl Display, mend: &str) -> Result<T> {
    Err(Error::wrap(framestride::Error::input(subject, found, allowed, mend)))
}
