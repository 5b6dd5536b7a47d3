//! A layer's tensors in device memory, in any of the arrangements that engines use.
//!
//! A tensor is copied to memory that was filled with [`POISON`]. So it is seen afterwards which
//! bytes a kernel wrote: those of the output, all of them, and nothing beside them.

use std::ops::Range;
use std::sync::Arc;

use framestride::device::Buffer;
use framestride::shapes::layout::Layout;
use framestride::shapes::params::{NormWeights, Tensor};
use framestride::shapes::spec::Dtype;
use framestride::{Device, Error, Layer, Result, Stream};
use rayon::prelude::*;

use crate::tensors::{ELEMENT, Inputs, Norm, Text, Tokens, widen};

/// How a `[B, S, H, D]` tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// \[B, S, H, D\] without gaps.
    TokensFirst,
    /// \[B, H, S, D\] with a gap of some rows behind each head and each batch item.
    HeadsFirst,
    /// One third of \[B, S, 3, H, D\], as one projection for Q, K and V leaves them. A tensor that
    /// lies alone is the middle third.
    PackedQkv,
    /// \[B, S, H, D\] with gaps. Addresses and strides are multiples of 2 bytes, and not of 16.
    Unaligned,
    /// Each row of \[B, H, S, D\] has memory of its own, [`APART`] bytes or more from the next.
    ///
    /// A row starts 2 bytes behind a multiple of 16. Offsets of all but the first few rows need
    /// more than 32 bits. Only the emulator has this arrangement, since a GPU chooses addresses
    /// itself.
    Scattered,
}

/// Least distance of scattered rows in bytes.
pub const APART: u64 = 1 << 28;

/// What memory holds before anything is written to it. Elements of this byte are NaN in all types.
pub const POISON: u8 = 0xff;

/// What a tensor is in its layer. Each has gaps of another size, so that no kernel can take the
/// strides of one for those of another unnoticed.
#[derive(Clone, Copy)]
enum Role {
    Q,
    K,
    V,
    Out,
}

/// Where the elements of a tensor lie in its memory. All numbers count elements.
#[derive(Clone, Copy)]
struct Strides {
    /// Index of the first element.
    first: usize,
    batch: usize,
    row: usize,
    head: usize,
    /// Elements of the whole memory, gaps included.
    all: usize,
}

impl Arrangement {
    /// All arrangements.
    pub const ALL: [Arrangement; 5] = [
        Arrangement::TokensFirst,
        Arrangement::HeadsFirst,
        Arrangement::PackedQkv,
        Arrangement::Unaligned,
        Arrangement::Scattered,
    ];

    fn strides(self, role: Role, [batch, rows, heads, dim]: [usize; 4]) -> Strides {
        let gap = 1 + role as usize;
        match self {
            Arrangement::TokensFirst => {
                let row = heads * dim;
                Strides { first: 0, batch: rows * row, row, head: dim, all: batch * rows * row }
            }
            Arrangement::HeadsFirst => {
                let head = (rows + gap) * dim;
                let item = heads * head + gap * dim;
                Strides { first: 0, batch: item, row: dim, head, all: batch * item }
            }
            Arrangement::PackedQkv => {
                let row = 3 * heads * dim;
                Strides { first: heads * dim, batch: rows * row, row, head: dim, all: batch * rows * row }
            }
            Arrangement::Unaligned => {
                let head = dim + gap;
                let row = heads * head + gap;
                let item = rows * row + gap;
                Strides { first: 1, batch: item, row, head, all: batch * item + 1 }
            }
            Arrangement::Scattered => {
                // One row's memory. The distance between rows is known when they are allocated.
                let row = dim + 2;
                let head = rows * row;
                Strides { first: 1, batch: heads * head, row, head, all: batch * heads * head }
            }
        }
    }
}

/// How the tensors of a layer lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Q, K and V.
    pub inputs: Arrangement,
    /// Q, K and V of the text before the video and after it, where they are tensors of their own.
    pub text: [Option<Arrangement>; 2],
    /// The output.
    pub out: Arrangement,
}

impl Placement {
    /// All tensors lie alike, and text lies with the video.
    pub const fn all(arrangement: Arrangement) -> Placement {
        Placement { inputs: arrangement, text: [None; 2], out: arrangement }
    }

    /// The rows of each group of Q, K and V, and how they lie. The first group has the video, and
    /// the others are text before the video and after it.
    fn groups(&self, layout: &Layout) -> [Option<(Range<usize>, Arrangement)>; 3] {
        let [before, after] = self.text;
        let (first, end) = (layout.before as usize, (layout.before + layout.video_tokens()) as usize);
        let sequence = layout.sequence() as usize;
        let joined = before.map_or(0, |_| first)..after.map_or(sequence, |_| end);
        [
            Some((joined, self.inputs)),
            before.map(|arrangement| (0..first, arrangement)),
            after.map(|arrangement| (end..sequence, arrangement)),
        ]
    }

    /// Bytes that [`DeviceLayer::upload`] allocates for Q, K, V and the output of a launch with
    /// `batch` items of `heads` heads.
    pub(crate) fn bytes(&self, layout: &Layout, [batch, heads, head_dim]: [usize; 3]) -> u64 {
        let elements = |role, arrangement: Arrangement, rows: usize| {
            arrangement.strides(role, [batch, rows, heads, head_dim]).all as u64
        };
        let inputs = self.groups(layout).into_iter().flatten().map(|(rows, arrangement)| {
            let roles =
                if arrangement == Arrangement::PackedQkv { &[Role::Q][..] } else { &[Role::Q, Role::K, Role::V] };
            roles.iter().map(|&role| elements(role, arrangement, rows.len())).sum::<u64>()
        });
        ELEMENT as u64 * (inputs.sum::<u64>() + elements(Role::Out, self.out, layout.sequence() as usize))
    }
}

impl Strides {
    /// Index of the first element of a row.
    fn index(self, batch: usize, row: usize, head: usize) -> usize {
        self.first + batch * self.batch + row * self.row + head * self.head
    }
}

/// A tensor in device memory.
pub struct DeviceTensor {
    /// One piece, or one for each scattered row of `[batch, heads, rows]`.
    memory: Arc<Vec<Buffer>>,
    strides: Strides,
    shape: [usize; 4],
    dtype: Dtype,
}

/// Bytes that are arranged on the host before they are copied to the device. They are enough to
/// keep all cores busy, and far less than a second copy of the tensor.
const STAGE: usize = 32 << 20;

impl DeviceTensor {
    /// Copies a tensor to the device, into memory that is [`POISON`] everywhere else.
    pub fn upload(device: &Device, tokens: &Tokens, arrangement: Arrangement) -> Result<DeviceTensor> {
        DeviceTensor::upload_as(device, Role::Q, tokens, 0..tokens.rows, arrangement)
    }

    fn upload_as(
        device: &Device,
        role: Role,
        tokens: &Tokens,
        rows: Range<usize>,
        arrangement: Arrangement,
    ) -> Result<DeviceTensor> {
        let tensor = DeviceTensor::new(device, role, tokens.dtype, tokens.shape_of(&rows), arrangement)?;
        copy(device, &[(&tensor, tokens)], rows.start)?;
        Ok(tensor)
    }

    /// Memory for an output, filled with [`POISON`].
    pub fn poisoned(
        device: &Device,
        dtype: Dtype,
        shape: [usize; 4],
        arrangement: Arrangement,
    ) -> Result<DeviceTensor> {
        DeviceTensor::new(device, Role::Out, dtype, shape, arrangement)
    }

    fn new(
        device: &Device,
        role: Role,
        dtype: Dtype,
        shape: [usize; 4],
        arrangement: Arrangement,
    ) -> Result<DeviceTensor> {
        let mut strides = arrangement.strides(role, shape);
        let memory = if arrangement == Arrangement::Scattered {
            let [batch, rows, heads, _] = shape;
            let apart = APART * (1 + role as u64);
            let Device::Emulator(emulator) = device else {
                return Err(Error::input(
                    "arrangement",
                    format!("scattered rows on {}", device.name()),
                    "scattered rows in the emulator: a GPU's addresses cannot be chosen",
                    "Take another arrangement",
                ));
            };
            let memory = emulator.scatter(batch * heads * rows, (strides.row * ELEMENT) as u64, apart)?;
            if let [first, second, ..] = &memory[..] {
                strides.row = (second.address() - first.address()) as usize / ELEMENT;
                strides.head = rows * strides.row;
                strides.batch = heads * strides.head;
            }
            memory
        } else {
            vec![device.allocate((strides.all * ELEMENT) as u64)?]
        };
        memory.iter().try_for_each(|piece| device.fill(Stream::DEFAULT, piece, POISON))?;
        Ok(DeviceTensor { memory: Arc::new(memory), strides, shape, dtype })
    }

    /// Copies rows of Q, K and V to the device. With [`Arrangement::PackedQkv`] they share one piece
    /// of memory.
    fn upload_rows(
        device: &Device,
        [q, k, v]: [&Tokens; 3],
        rows: Range<usize>,
        arrangement: Arrangement,
    ) -> Result<[DeviceTensor; 3]> {
        if arrangement != Arrangement::PackedQkv {
            let upload = |role, tokens| DeviceTensor::upload_as(device, role, tokens, rows.clone(), arrangement);
            return Ok([upload(Role::Q, q)?, upload(Role::K, k)?, upload(Role::V, v)?]);
        }
        let whole = DeviceTensor::new(device, Role::Q, q.dtype, q.shape_of(&rows), arrangement)?;
        let thirds = [0, 1, 2].map(|third| DeviceTensor {
            memory: Arc::clone(&whole.memory),
            strides: Strides { first: third * q.heads * q.head_dim, ..whole.strides },
            ..whole
        });
        copy(device, &[(&thirds[0], q), (&thirds[1], k), (&thirds[2], v)], rows.start)?;
        Ok(thirds)
    }

    /// Address and strides, as a kernel is given them.
    pub fn tensor(&self) -> Tensor {
        let strides = self.strides;
        Tensor {
            data: self.memory[0].address() + (strides.first * ELEMENT) as u64,
            batch: strides.batch as u64,
            row: strides.row as u64,
            head: strides.head as u64,
        }
    }

    /// Copies all of the memory to the host.
    pub fn read(&self, device: &Device) -> Result<HostCopy<'_>> {
        let pieces = self.memory.iter().map(|piece| device.read(piece, 0, piece.bytes())).collect::<Result<_>>()?;
        Ok(HostCopy { tensor: self, pieces })
    }

    /// The tensor, and how many bytes beside it are no longer [`POISON`].
    pub fn download(&self, device: &Device) -> Result<(Tokens, usize)> {
        let copy = self.read(device)?;
        let mut tokens = Tokens::zeros(self.dtype, self.shape);
        let [_, rows, heads, dim] = self.shape;
        tokens.bits.par_chunks_exact_mut(heads * dim).enumerate().for_each(|(token, bits)| {
            for (head, bits) in bits.chunks_exact_mut(dim).enumerate() {
                for (bits, &bytes) in bits.iter_mut().zip(copy.row_bytes(token / rows, token % rows, head)) {
                    *bits = u16::from_le_bytes(bytes);
                }
            }
        });
        Ok((tokens, copy.stray()))
    }
}

/// Copies rows from `first_row` on to tensors of one arrangement that share one memory, [`STAGE`]
/// bytes at a time.
fn copy(device: &Device, tensors: &[(&DeviceTensor, &Tokens)], first_row: usize) -> Result<()> {
    let Some(&(DeviceTensor { memory, strides, shape, .. }, tokens)) = tensors.first() else { return Ok(()) };
    let [batch, rows, heads, dim] = *shape;
    let [buffer] = &memory[..] else {
        return memory.iter().enumerate().try_for_each(|(piece, buffer)| {
            let index = tokens.index(piece / rows / heads, first_row + piece % rows, piece / rows % heads);
            let row: Vec<u8> = tokens.bits[index..][..dim].iter().flat_map(|bits| bits.to_le_bytes()).collect();
            device.write(buffer, (strides.first * ELEMENT) as u64, &row)
        });
    };
    // A unit is what lies together of one token: all of its heads, or one head where a head's rows
    // are contiguous. The units of a batch item follow each other without a gap. Behind the rows of
    // each head come units that stay empty.
    let by_head = strides.head > strides.row;
    let rows_of_head = strides.head / strides.row;
    let (unit, units) = if by_head { (strides.row, heads * rows_of_head) } else { (strides.row, rows) };
    let most = (STAGE / ELEMENT / unit).clamp(1, units);
    let mut stage = vec![POISON; most * unit * ELEMENT];
    for item in 0..batch {
        for start in (0..units).step_by(most) {
            let stage = &mut stage[..most.min(units - start) * unit * ELEMENT];
            stage.par_chunks_exact_mut(unit * ELEMENT).enumerate().with_min_len(64).for_each(|(index, bytes)| {
                let index = start + index;
                let (row, heads) = if by_head {
                    (index % rows_of_head, index / rows_of_head..index / rows_of_head + 1)
                } else {
                    (index, 0..heads)
                };
                if row >= rows {
                    return bytes.fill(POISON);
                }
                for (tensor, tokens) in tensors {
                    for (head, number) in heads.clone().zip(0..) {
                        let first = tensor.strides.first + number * tensor.strides.head * usize::from(!by_head);
                        let bits = &tokens.bits[tokens.index(item, first_row + row, head)..][..dim];
                        for (bytes, bits) in bytes[first * ELEMENT..].as_chunks_mut::<ELEMENT>().0.iter_mut().zip(bits)
                        {
                            *bytes = bits.to_le_bytes();
                        }
                    }
                }
            });
            device.write(buffer, ((item * strides.batch + start * unit) * ELEMENT) as u64, stage)?;
        }
    }
    Ok(())
}

/// A tensor's memory, copied to the host.
pub struct HostCopy<'a> {
    tensor: &'a DeviceTensor,
    /// The bytes of each piece of the tensor's memory.
    pieces: Vec<Vec<u8>>,
}

impl HostCopy<'_> {
    fn row_bytes(&self, batch: usize, row: usize, head: usize) -> &[[u8; ELEMENT]] {
        let DeviceTensor { strides, shape: [_, rows, heads, dim], .. } = self.tensor;
        let (bytes, index) = match &self.pieces[..] {
            [bytes] => (bytes, strides.index(batch, row, head)),
            pieces => (&pieces[(batch * heads + head) * rows + row], strides.first),
        };
        bytes[index * ELEMENT..][..dim * ELEMENT].as_chunks().0
    }

    /// One row of one head.
    pub fn row(&self, batch: usize, row: usize, head: usize) -> Vec<f64> {
        let dtype = self.tensor.dtype;
        self.row_bytes(batch, row, head).iter().map(|&bytes| widen(dtype, u16::from_le_bytes(bytes))).collect()
    }

    /// Number of bytes beside the tensor that are no longer [`POISON`].
    pub fn stray(&self) -> usize {
        let all = self.pieces.iter().map(|bytes| bytes.par_chunks(1 << 16).map(touched).sum::<usize>()).sum::<usize>();
        all - self.sum_rows(|row| touched(row.as_flattened()))
    }

    /// Number of elements of the tensor that are still [`POISON`].
    pub fn unwritten(&self) -> usize {
        self.sum_rows(|row| row.iter().map(|&element| usize::from(element == [POISON; ELEMENT])).sum())
    }

    fn sum_rows(&self, count: impl Fn(&[[u8; ELEMENT]]) -> usize + Sync) -> usize {
        let [batch, rows, heads, _] = self.tensor.shape;
        let tokens = (0..batch * rows).into_par_iter().with_min_len(64);
        let of_token = |token| (0..heads).map(|head| count(self.row_bytes(token / rows, token % rows, head))).sum();
        tokens.map(|token: usize| -> usize { of_token(token) }).sum()
    }
}

/// Number of bytes that are not [`POISON`].
fn touched(bytes: &[u8]) -> usize {
    bytes.iter().map(|&byte| usize::from(byte != POISON)).sum()
}

/// A layer on the device: all that it reads, its output and its log-sum-exp.
pub struct DeviceLayer {
    /// The addresses of all, for a call.
    pub layer: Layer,
    /// The output, filled with [`POISON`] at first.
    pub out: DeviceTensor,
    /// f32 \[B, H, S\], filled with [`POISON`] at first.
    lse: Buffer,
    /// Q, K and V of each group of rows.
    inputs: Vec<DeviceTensor>,
    /// The memory of norm weights, RoPE tables and lengths of text.
    buffers: Vec<Buffer>,
}

/// Elements behind the RoPE table of each batch item, which nothing reads.
const ROPE_GAP: usize = 64;

fn upload_words(device: &Device, words: impl Iterator<Item = [u8; 4]>) -> Result<Buffer> {
    device.upload(&words.flatten().collect::<Vec<u8>>())
}

impl DeviceLayer {
    /// Copies `inputs` to the device, and makes room for an output.
    pub fn upload(device: &Device, layout: &Layout, inputs: &Inputs, placement: Placement) -> Result<DeviceLayer> {
        let mut buffers = Vec::new();
        let mut floats = |values: Option<&Vec<f32>>| -> Result<u64> {
            let Some(values) = values else { return Ok(0) };
            let buffer = upload_words(device, values.iter().map(|value| value.to_le_bytes()))?;
            let address = buffer.address();
            buffers.push(buffer);
            Ok(address)
        };
        let mut norm = |norm: &Norm| -> Result<NormWeights> {
            Ok(NormWeights { weight: floats(norm.weight.as_ref())?, bias: floats(norm.bias.as_ref())? })
        };
        let (q_norm, k_norm) = (norm(&inputs.q_norm)?, norm(&inputs.k_norm)?);
        let mut text = |text: &Text| -> Result<framestride::Text> {
            Ok(framestride::Text {
                qkv: None,
                lengths: 0,
                q_norm: text.q_norm.as_ref().map(&mut norm).transpose()?,
                k_norm: text.k_norm.as_ref().map(&mut norm).transpose()?,
            })
        };
        let mut layer = Layer {
            q_norm,
            k_norm,
            before: text(&inputs.before)?,
            after: text(&inputs.after)?,
            scale: inputs.scale,
            ..Layer::default()
        };
        if let Some(tables) = &inputs.rope {
            let length = tables.cos.len() / tables.items;
            // What lies between the tables of two items is NaN.
            let spread = |table: &[f32]| -> Vec<f32> {
                let items = table.chunks_exact(length);
                items.flat_map(|item| item.iter().copied().chain([f32::NAN; ROPE_GAP])).collect()
            };
            (layer.cos, layer.sin) = (floats(Some(&spread(&tables.cos)))?, floats(Some(&spread(&tables.sin)))?);
            layer.rope_batch = if tables.items == 1 { 0 } else { (length + ROPE_GAP) as u64 };
        }
        for (text, inputs) in [(&mut layer.before, &inputs.before), (&mut layer.after, &inputs.after)] {
            let Some(lengths) = &inputs.lengths else { continue };
            let buffer = upload_words(device, lengths.iter().map(|length| length.to_le_bytes()))?;
            text.lengths = buffer.address();
            buffers.push(buffer);
        }
        let mut tensors = Vec::new();
        for (group, rows) in placement.groups(layout).into_iter().enumerate() {
            let Some((rows, arrangement)) = rows else { continue };
            let qkv = DeviceTensor::upload_rows(device, [&inputs.q, &inputs.k, &inputs.v], rows, arrangement)?;
            let [q, k, v] = [0, 1, 2].map(|operand: usize| qkv[operand].tensor());
            match group {
                0 => (layer.q, layer.k, layer.v) = (q, k, v),
                1 => layer.before.qkv = Some([q, k, v]),
                _ => layer.after.qkv = Some([q, k, v]),
            }
            tensors.extend(qkv);
        }
        let shape = inputs.q.shape();
        let out = DeviceTensor::poisoned(device, inputs.q.dtype, shape, placement.out)?;
        layer.out = out.tensor();
        let lse = device.allocate((shape[0] * shape[1] * shape[2] * 4) as u64)?;
        device.fill(Stream::DEFAULT, &lse, POISON)?;
        layer.lse = lse.address();
        Ok(DeviceLayer { layer, out, lse, inputs: tensors, buffers })
    }

    /// Copies all that this layer reads over what `to` reads, in stream order. Both were made from
    /// inputs of the same shape.
    pub(crate) fn copy_inputs(&self, device: &Device, stream: Stream, to: &DeviceLayer) -> Result<()> {
        let [from, to] =
            [self, to].map(|layer| layer.inputs.iter().flat_map(|input| &*input.memory).chain(&layer.buffers));
        from.zip(to).try_for_each(|(from, to)| device.copy(stream, from, to))
    }

    /// The memory of the output, which is not scattered, and that of the log-sum-exp.
    pub(crate) fn results(&self) -> [&Buffer; 2] {
        [&self.out.memory[0], &self.lse]
    }

    /// Log-sum-exp, `[B, H, S]`.
    pub fn download_lse(&self, device: &Device) -> Result<Vec<f32>> {
        let bytes = device.read(&self.lse, 0, self.lse.bytes())?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }
}
