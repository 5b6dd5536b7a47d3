//! Inputs and output of a layer in device memory, in any of the arrangements that engines use.

use std::sync::Arc;

use framestride::device::Buffer;
use framestride::shapes::launch::{NormWeights, Tensor};
use framestride::shapes::spec::Dtype;
use framestride::{Device, Error, Layer, Result, Stream};
use rayon::prelude::*;

use crate::inputs::{Inputs, Norm, Tokens, widen};

/// How a `[B, S, H, D]` tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// \[B, S, H, D\].
    TokensFirst,
    /// \[B, H, S, D\] with rows between heads and between batch items that belong to nobody: more of them for K than for Q, and so on.
    HeadsFirst,
    /// One third of \[B, S, 3, H, D\], as one projection for Q, K and V leaves them; the middle one of a tensor alone.
    PackedQkv,
    /// \[B, S, H, D\] with gaps, wider for K than for Q, and so on. No stride is a multiple of 16 bytes: only of 2.
    Unaligned,
    /// In the emulator, each row of \[B, H, S, D\] in memory of its own, 2 bytes behind a multiple of 16, [`APART`] bytes or more from the
    /// next: offsets of all but the first few rows need more than 32 bits. On a GPU it is not to be had.
    Scattered,
}

/// Least distance of scattered rows in bytes.
pub const APART: u64 = 1 << 28;

/// Every byte that no tensor owns, and every output before it is written: NaN in all the types here.
pub const POISON: u8 = 0xff;

/// Which tensor of a layer: gaps differ, so that strides of one cannot be taken for those of another.
#[derive(Clone, Copy)]
enum Which {
    Q,
    K,
    V,
    Out,
}

/// Elements from the start of the memory to the first element, strides, and elements in all.
#[derive(Clone, Copy)]
struct Place {
    first: usize,
    batch: usize,
    row: usize,
    head: usize,
    elements: usize,
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

    fn place(self, which: Which, [batch, rows, heads, dim]: [usize; 4]) -> Place {
        let gap = 1 + which as usize;
        match self {
            Arrangement::TokensFirst => {
                let row = heads * dim;
                Place { first: 0, batch: rows * row, row, head: dim, elements: batch * rows * row }
            }
            Arrangement::HeadsFirst => {
                let head = (rows + gap) * dim;
                let item = heads * head + gap * dim;
                Place { first: 0, batch: item, row: dim, head, elements: batch * item }
            }
            Arrangement::PackedQkv => {
                let row = 3 * heads * dim;
                Place { first: heads * dim, batch: rows * row, row, head: dim, elements: batch * rows * row }
            }
            Arrangement::Unaligned => {
                let head = dim + gap;
                let row = heads * head + gap;
                let item = rows * row + gap;
                Place { first: 1, batch: item, row, head, elements: batch * item + 1 }
            }
            Arrangement::Scattered => {
                // As for one row alone; of several, the distance is known when they are allocated.
                let row = dim + 2;
                let head = rows * row;
                Place { first: 1, batch: heads * head, row, head, elements: batch * heads * head }
            }
        }
    }
}

/// Bytes that [`PlacedLayer::upload`] allocates for Q, K, V and the output of this shape, arranged so.
pub(crate) fn layer_bytes(shape: [usize; 4], arrangement: Arrangement, out: Arrangement) -> u64 {
    let elements = |which, arrangement: Arrangement| arrangement.place(which, shape).elements as u64;
    let inputs = if arrangement == Arrangement::PackedQkv { &[Which::Q][..] } else { &[Which::Q, Which::K, Which::V] };
    2 * (inputs.iter().map(|&which| elements(which, arrangement)).sum::<u64>() + elements(Which::Out, out))
}

impl Place {
    /// Index of the first element of a row.
    fn index(self, batch: usize, row: usize, head: usize) -> usize {
        self.first + batch * self.batch + row * self.row + head * self.head
    }
}

/// A tensor in device memory.
pub struct Placed {
    /// All of it, or a piece for each scattered row of `[batch, heads, rows]`.
    memory: Arc<Vec<Buffer>>,
    place: Place,
    shape: [usize; 4],
    dtype: Dtype,
}

/// Bytes that are put in order on the host before they go to the device: enough to keep all cores busy, and no second copy of a
/// tensor that takes gigabytes.
const STAGE: usize = 32 << 20;

impl Placed {
    /// Copies a tensor to the device; everything around it is [`POISON`].
    pub fn upload(device: &Device, tokens: &Tokens, arrangement: Arrangement) -> Result<Placed> {
        Placed::upload_which(device, Which::Q, tokens, arrangement)
    }

    fn upload_which(device: &Device, which: Which, tokens: &Tokens, arrangement: Arrangement) -> Result<Placed> {
        let placed = Placed::new(device, which, tokens.dtype, tokens.shape(), arrangement)?;
        copy(device, &[(&placed, tokens)])?;
        Ok(placed)
    }

    /// Memory for an output, all [`POISON`].
    pub fn poisoned(device: &Device, dtype: Dtype, shape: [usize; 4], arrangement: Arrangement) -> Result<Placed> {
        Placed::new(device, Which::Out, dtype, shape, arrangement)
    }

    fn new(device: &Device, which: Which, dtype: Dtype, shape: [usize; 4], arrangement: Arrangement) -> Result<Placed> {
        let mut place = arrangement.place(which, shape);
        let memory = if arrangement == Arrangement::Scattered {
            let [batch, rows, heads, _] = shape;
            let apart = APART * (1 + which as u64);
            let Device::Emulator(emulator) = device else {
                return Err(Error::input(
                    "arrangement",
                    format!("scattered rows on {}", device.name()),
                    "scattered rows in the emulator: a GPU's addresses cannot be chosen",
                    "Take another arrangement",
                ));
            };
            let memory = emulator.scatter(batch * heads * rows, place.row as u64 * 2, apart)?;
            if let [first, second, ..] = &memory[..] {
                place.row = ((second.address() - first.address()) / 2) as usize;
                place.head = rows * place.row;
                place.batch = heads * place.head;
            }
            memory
        } else {
            vec![device.allocate(place.elements as u64 * 2)?]
        };
        memory.iter().try_for_each(|piece| device.fill(Stream::DEFAULT, piece, POISON))?;
        Ok(Placed { memory: Arc::new(memory), place, shape, dtype })
    }

    /// Copies Q, K and V to the device: the thirds of one piece of memory for [`Arrangement::PackedQkv`].
    fn upload_layer(device: &Device, tensors: [&Tokens; 3], arrangement: Arrangement) -> Result<[Placed; 3]> {
        let [q, k, v] = tensors;
        if arrangement != Arrangement::PackedQkv {
            let upload = |which, tokens| Placed::upload_which(device, which, tokens, arrangement);
            return Ok([upload(Which::Q, q)?, upload(Which::K, k)?, upload(Which::V, v)?]);
        }
        let whole = Placed::new(device, Which::Q, q.dtype, q.shape(), arrangement)?;
        let thirds = [0, 1, 2].map(|third| Placed {
            memory: Arc::clone(&whole.memory),
            place: Place { first: third * q.heads * q.head_dim, ..whole.place },
            ..whole
        });
        copy(device, &[(&thirds[0], q), (&thirds[1], k), (&thirds[2], v)])?;
        Ok(thirds)
    }

    /// The descriptor that kernels get.
    pub fn tensor(&self) -> Tensor {
        let place = self.place;
        Tensor {
            data: self.memory[0].address() + place.first as u64 * 2,
            batch: place.batch as u64,
            row: place.row as u64,
            head: place.head as u64,
        }
    }

    /// The memory as it is now.
    pub fn read(&self, device: &Device) -> Result<Image<'_>> {
        let pieces = self.memory.iter().map(|piece| device.read(piece, 0, piece.bytes())).collect::<Result<_>>()?;
        Ok(Image { placed: self, pieces })
    }

    /// The tensor, and how many bytes around it are no longer [`POISON`].
    pub fn download(&self, device: &Device) -> Result<(Tokens, usize)> {
        let image = self.read(device)?;
        let mut tokens = Tokens::zeros(self.dtype, self.shape);
        let [_, rows, heads, dim] = self.shape;
        tokens.bits.par_chunks_exact_mut(heads * dim).enumerate().for_each(|(token, bits)| {
            for (head, bits) in bits.chunks_exact_mut(dim).enumerate() {
                for (bits, &bytes) in bits.iter_mut().zip(image.row_bytes(token / rows, token % rows, head)) {
                    *bits = u16::from_le_bytes(bytes);
                }
            }
        });
        Ok((tokens, image.stray()))
    }
}

/// Puts tensors that lie alike, each in its part of the same memory, in order on the host and copies them, [`STAGE`] bytes at a
/// time.
fn copy(device: &Device, tensors: &[(&Placed, &Tokens)]) -> Result<()> {
    let Some(&(Placed { memory, place, shape, .. }, tokens)) = tensors.first() else { return Ok(()) };
    let [batch, rows, heads, dim] = *shape;
    let [buffer] = &memory[..] else {
        return memory.iter().enumerate().try_for_each(|(piece, buffer)| {
            let index = tokens.index(piece / rows / heads, piece % rows, piece / rows % heads);
            let row: Vec<u8> = tokens.bits[index..][..dim].iter().flat_map(|bits| bits.to_le_bytes()).collect();
            device.write(buffer, place.first as u64 * 2, &row)
        });
    };
    // A unit is what lies together of one token: all its heads, or one where a head's rows are contiguous. Units of one batch
    // item follow each other without a gap, and each is filled alike; behind those of a head come some that are not filled.
    let by_head = place.head > place.row;
    let rows_of_head = place.head / place.row;
    let (unit, units) = if by_head { (place.row, heads * rows_of_head) } else { (place.row, rows) };
    let most = (STAGE / 2 / unit).clamp(1, units);
    let mut stage = vec![POISON; most * unit * 2];
    for item in 0..batch {
        for start in (0..units).step_by(most) {
            let stage = &mut stage[..most.min(units - start) * unit * 2];
            stage.par_chunks_exact_mut(unit * 2).enumerate().with_min_len(64).for_each(|(index, bytes)| {
                let index = start + index;
                let (row, heads) = if by_head {
                    (index % rows_of_head, index / rows_of_head..index / rows_of_head + 1)
                } else {
                    (index, 0..heads)
                };
                if row >= rows {
                    return bytes.fill(POISON);
                }
                for (placed, tokens) in tensors {
                    for (head, number) in heads.clone().zip(0..) {
                        let first = placed.place.first + number * placed.place.head * usize::from(!by_head);
                        let bits = &tokens.bits[tokens.index(item, row, head)..][..dim];
                        for (bytes, bits) in bytes[first * 2..].as_chunks_mut::<2>().0.iter_mut().zip(bits) {
                            *bytes = bits.to_le_bytes();
                        }
                    }
                }
            });
            device.write(buffer, ((item * place.batch + start * unit) * 2) as u64, stage)?;
        }
    }
    Ok(())
}

/// A tensor's memory, copied to the host.
pub struct Image<'a> {
    placed: &'a Placed,
    /// As the memory is.
    pieces: Vec<Vec<u8>>,
}

impl Image<'_> {
    fn row_bytes(&self, batch: usize, row: usize, head: usize) -> &[[u8; 2]] {
        let Placed { place, shape: [_, rows, heads, dim], .. } = self.placed;
        let (bytes, index) = match &self.pieces[..] {
            [bytes] => (bytes, place.index(batch, row, head)),
            pieces => (&pieces[(batch * heads + head) * rows + row], place.first),
        };
        bytes[index * 2..][..dim * 2].as_chunks().0
    }

    /// One row of one head.
    pub fn row(&self, batch: usize, row: usize, head: usize) -> Vec<f64> {
        let dtype = self.placed.dtype;
        self.row_bytes(batch, row, head).iter().map(|&bytes| widen(dtype, u16::from_le_bytes(bytes))).collect()
    }

    /// Bytes around the tensor that are no longer [`POISON`].
    pub fn stray(&self) -> usize {
        let all = self.pieces.iter().map(|bytes| bytes.par_chunks(1 << 16).map(touched).sum::<usize>()).sum::<usize>();
        all - self.sum_rows(|row| touched(row.as_flattened()))
    }

    /// Elements of the tensor that are still [`POISON`].
    pub fn unwritten(&self) -> usize {
        self.sum_rows(|row| row.iter().map(|&element| usize::from(element == [POISON; 2])).sum())
    }

    fn sum_rows(&self, count: impl Fn(&[[u8; 2]]) -> usize + Sync) -> usize {
        let [batch, rows, heads, _] = self.placed.shape;
        let tokens = (0..batch * rows).into_par_iter().with_min_len(64);
        let of_token = |token| (0..heads).map(|head| count(self.row_bytes(token / rows, token % rows, head))).sum();
        tokens.map(|token: usize| -> usize { of_token(token) }).sum()
    }
}

/// Bytes that are not [`POISON`].
fn touched(bytes: &[u8]) -> usize {
    bytes.iter().map(|&byte| usize::from(byte != POISON)).sum()
}

/// All inputs of a layer on the device, its output and log-sum-exp.
pub struct PlacedLayer {
    /// Addresses for a call.
    pub layer: Layer,
    /// The output, poisoned at first.
    pub out: Placed,
    /// f32 \[B, H, S\], poisoned at first.
    lse: Buffer,
    /// Q, K and V.
    inputs: [Placed; 3],
    /// Everything else that the layer reads.
    buffers: Vec<Buffer>,
}

fn upload_words(device: &Device, words: impl Iterator<Item = [u8; 4]>) -> Result<Buffer> {
    device.upload(&words.flatten().collect::<Vec<u8>>())
}

impl PlacedLayer {
    /// Copies `inputs` to the device, Q, K and V as `arrangement`, and makes room for an output as `out`.
    pub fn upload(device: &Device, inputs: &Inputs, arrangement: Arrangement, out: Arrangement) -> Result<PlacedLayer> {
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
        let mut layer = Layer {
            q_norm: norm(&inputs.q_norm)?,
            k_norm: norm(&inputs.k_norm)?,
            q_norm_text: inputs.q_norm_text.as_ref().map(&mut norm).transpose()?,
            k_norm_text: inputs.k_norm_text.as_ref().map(&mut norm).transpose()?,
            scale: inputs.scale,
            ..Layer::default()
        };
        if let Some(tables) = &inputs.rope {
            (layer.cos, layer.sin) = (floats(Some(&tables.cos))?, floats(Some(&tables.sin))?);
        }
        if let Some(lengths) = &inputs.text_lengths {
            let buffer = upload_words(device, lengths.iter().map(|length| length.to_le_bytes()))?;
            layer.text_lengths = buffer.address();
            buffers.push(buffer);
        }
        let placed = Placed::upload_layer(device, [&inputs.q, &inputs.k, &inputs.v], arrangement)?;
        (layer.q, layer.k, layer.v) = (placed[0].tensor(), placed[1].tensor(), placed[2].tensor());
        let shape = inputs.q.shape();
        let out = Placed::poisoned(device, inputs.q.dtype, shape, out)?;
        layer.out = out.tensor();
        let lse = device.allocate((shape[0] * shape[1] * shape[2] * 4) as u64)?;
        device.fill(Stream::DEFAULT, &lse, POISON)?;
        layer.lse = lse.address();
        Ok(PlacedLayer { layer, out, lse, inputs: placed, buffers })
    }

    /// Copies all that this layer reads over what `to`, made from inputs of the same shape, reads: in stream order.
    pub(crate) fn copy_inputs(&self, device: &Device, stream: Stream, to: &PlacedLayer) -> Result<()> {
        let [from, to] =
            [self, to].map(|layer| layer.inputs.iter().flat_map(|input| &*input.memory).chain(&layer.buffers));
        from.zip(to).try_for_each(|(from, to)| device.copy(stream, from, to))
    }

    /// The memory of output, which is not scattered, and log-sum-exp.
    pub(crate) fn results(&self) -> [&Buffer; 2] {
        [&self.out.memory[0], &self.lse]
    }

    /// Log-sum-exp, `[B, H, S]`.
    pub fn download_lse(&self, device: &Device) -> Result<Vec<f32>> {
        let bytes = device.read(&self.lse, 0, self.lse.bytes())?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }
}
