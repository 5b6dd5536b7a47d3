//! Inputs and output of a layer in device memory, in any of the arrangements that engines use.

use framestride_shapes::launch::{NormWeights, Tensor};
use framestride_shapes::spec::Dtype;

use crate::attention::Layer;
use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::inputs::{Inputs, Norm, Tokens};

/// How a `[B, S, H, D]` tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// \[B, S, H, D\].
    TokensFirst,
    /// \[B, H, S, D\].
    HeadsFirst,
    /// One third of \[B, S, 3, H, D\], as one projection for Q, K and V leaves them.
    PackedQkv,
    /// \[B, S, H, D\] with gaps, and no row at a multiple of 16 bytes by design: only of 2.
    Unaligned,
}

/// Every byte that no tensor owns, and every output before it is written: NaN in all the types here.
pub const POISON: u8 = 0xff;

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
    pub const ALL: [Arrangement; 4] =
        [Arrangement::TokensFirst, Arrangement::HeadsFirst, Arrangement::PackedQkv, Arrangement::Unaligned];

    fn place(self, [batch, rows, heads, dim]: [usize; 4]) -> Place {
        match self {
            Arrangement::TokensFirst => {
                let row = heads * dim;
                Place { first: 0, batch: rows * row, row, head: dim, elements: batch * rows * row }
            }
            Arrangement::HeadsFirst => {
                let head = rows * dim;
                Place { first: 0, batch: heads * head, row: dim, head, elements: batch * heads * head }
            }
            Arrangement::PackedQkv => {
                let row = 3 * heads * dim;
                Place { first: heads * dim, batch: rows * row, row, head: dim, elements: batch * rows * row }
            }
            Arrangement::Unaligned => {
                let head = dim + 1;
                let row = heads * head + 2;
                Place { first: 1, batch: rows * row + 3, row, head, elements: batch * (rows * row + 3) + 1 }
            }
        }
    }
}

impl Place {
    /// Index of the first element of every row, in the order of `[B, S, H]`.
    fn rows(self, [batch, rows, heads, _]: [usize; 4]) -> impl Iterator<Item = usize> {
        (0..batch * rows * heads).map(move |index| {
            let (item, row, head) = (index / heads / rows, index / heads % rows, index % heads);
            self.first + item * self.batch + row * self.row + head * self.head
        })
    }
}

/// A tensor in device memory.
pub struct Placed {
    buffer: Buffer,
    arrangement: Arrangement,
    shape: [usize; 4],
    dtype: Dtype,
}

impl Placed {
    /// Copies a tensor to the device; everything around it is [`POISON`].
    pub fn upload(device: &Device, tokens: &Tokens, arrangement: Arrangement) -> Result<Placed> {
        let (shape, dim) = (tokens.shape(), tokens.head_dim);
        let place = arrangement.place(shape);
        let mut bytes = vec![POISON; place.elements * 2];
        for (first, row) in place.rows(shape).zip(tokens.bits.chunks_exact(dim)) {
            for (bytes, bits) in bytes[first * 2..].as_chunks_mut::<2>().0.iter_mut().zip(row) {
                *bytes = bits.to_le_bytes();
            }
        }
        Ok(Placed { buffer: device.upload(&bytes)?, arrangement, shape, dtype: tokens.dtype })
    }

    /// Memory for a tensor, all [`POISON`].
    pub fn poisoned(device: &Device, dtype: Dtype, shape: [usize; 4], arrangement: Arrangement) -> Result<Placed> {
        let buffer = device.allocate(arrangement.place(shape).elements as u64 * 2)?;
        device.fill(&buffer, POISON)?;
        Ok(Placed { buffer, arrangement, shape, dtype })
    }

    /// The descriptor that kernels get.
    pub fn tensor(&self) -> Tensor {
        let place = self.arrangement.place(self.shape);
        Tensor {
            data: self.buffer.address() + place.first as u64 * 2,
            batch: place.batch as u64,
            row: place.row as u64,
            head: place.head as u64,
        }
    }

    /// The tensor, and how many bytes around it are no longer [`POISON`].
    pub fn download(&self, device: &Device) -> Result<(Tokens, usize)> {
        let mut bytes = device.read(&self.buffer, 0, self.buffer.bytes())?;
        let dim = self.shape[3];
        let mut tokens = Tokens::zeros(self.dtype, self.shape);
        let place = self.arrangement.place(self.shape);
        for (first, row) in place.rows(self.shape).zip(tokens.bits.chunks_exact_mut(dim)) {
            for (bits, bytes) in row.iter_mut().zip(bytes[first * 2..].as_chunks_mut::<2>().0) {
                *bits = u16::from_le_bytes(*bytes);
                *bytes = [POISON; 2];
            }
        }
        let written = bytes.iter().filter(|&&byte| byte != POISON).count();
        Ok((tokens, written))
    }
}

/// All inputs of a layer on the device, its output and log-sum-exp.
pub struct PlacedLayer {
    /// Addresses for a call.
    pub layer: Layer,
    /// The output, poisoned at first.
    pub out: Placed,
    /// f32 \[B, H, S\], poisoned at first.
    lse: Buffer,
    /// Kept for their memory.
    _inputs: Vec<Placed>,
    _buffers: Vec<Buffer>,
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
        let placed = [&inputs.q, &inputs.k, &inputs.v]
            .into_iter()
            .map(|tokens| Placed::upload(device, tokens, arrangement))
            .collect::<Result<Vec<_>>>()?;
        (layer.q, layer.k, layer.v) = (placed[0].tensor(), placed[1].tensor(), placed[2].tensor());
        let shape = inputs.q.shape();
        let out = Placed::poisoned(device, inputs.q.dtype, shape, out)?;
        layer.out = out.tensor();
        let lse = device.allocate((shape[0] * shape[1] * shape[2] * 4) as u64)?;
        device.fill(&lse, POISON)?;
        layer.lse = lse.address();
        Ok(PlacedLayer { layer, out, lse, _inputs: placed, _buffers: buffers })
    }

    /// Log-sum-exp, `[B, H, S]`.
    pub fn download_lse(&self, device: &Device) -> Result<Vec<f32>> {
        let bytes = device.read(&self.lse, 0, self.lse.bytes())?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }
}
