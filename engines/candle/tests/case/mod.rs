//! Attention with everything that can be given, and the same from candle's own ops on the CPU.

use candle_core::{D, DType, Device, Result, Tensor};
use framestride_candle::shapes::dtype::Dtype;
use framestride_candle::shapes::spec::{self, NormKind, NormOver, Pairs, QkNorm, Width};
use framestride_candle::{Attention, Norm, Rope, Spec, Text};

use crate::common::{device, rows, wave};

const FRAMES: usize = 5;
const FRAME_TOKENS: usize = if cfg!(feature = "cuda") { 400 } else { 26 };
pub const VIDEO: usize = FRAMES * FRAME_TOKENS;
pub const BEFORE: usize = 9;
pub const AFTER: usize = 20;
pub const S: usize = BEFORE + VIDEO + AFTER;
pub const BATCH: usize = 2;
pub const HEADS: usize = 3;
pub const HEAD_DIM: usize = 64;
const EPS: f64 = 1e-5;
/// Valid tokens of the two batch items on each side.
const LENGTHS: [[u32; BATCH]; 2] = [[9, 4], [13, 20]];
const HALF_WIDTHS: [usize; 2] = [FRAME_TOKENS + 5, 4 * FRAMES + 3];

/// With `NormOver::Heads`, each head has RoPE tables of its own too.
fn spec(dtype: Dtype, kind: NormKind, over: NormOver, pairs: Pairs) -> Spec {
    Spec::builder()
        .name("candle")
        .frames(FRAMES as u32)
        .tokens_per_frame(FRAME_TOKENS as u32)
        .before(BEFORE as u32)
        .after(AFTER as u32)
        .heads(HEADS as u32)
        .head_dim(HEAD_DIM as u32)
        .dtype(dtype)
        .qk_norm(QkNorm { kind, over, eps: EPS })
        .rope(spec::Rope {
            pairs,
            channels: HEAD_DIM as u32,
            before: false,
            after: false,
            per_head: over == NormOver::Heads,
        })
        .spatial(Width::Tokens(HALF_WIDTHS[0] as u32))
        .temporal(Width::Tokens(HALF_WIDTHS[1] as u32))
        .build()
        .expect("the spec is right")
}

/// Attention with everything that can be given, and tensors for it.
pub struct Case {
    pub attention: Attention,
    pub qkv: [Tensor; 3],
    pub angles: Tensor,
}

impl Case {
    pub fn new(dtype: Dtype, kind: NormKind, over: NormOver, pairs: Pairs) -> Result<Case> {
        let device = device()?;
        let mut attention = Attention::load(&device, &spec(dtype, kind, over, pairs))?;
        let is_over_heads = over == NormOver::Heads;
        let length = if is_over_heads { HEADS * HEAD_DIM } else { HEAD_DIM };
        let norm = |seed: f64| -> Result<Norm> {
            let weight = Some(((wave(seed, length, &device)? * 0.5)? + 1.0)?);
            let bias = if kind == NormKind::Layer { Some((wave(seed + 0.3, length, &device)? * 0.2)?) } else { None };
            Ok(Norm { weight, bias })
        };
        (attention.q_norm, attention.k_norm) = (norm(0.9)?, norm(0.4)?);
        let lengths = |side: usize| Tensor::new(&LENGTHS[side], &device).map(Some);
        attention.before =
            Text { lengths: lengths(0)?, q_norm: Some(norm(0.15)?), k_norm: Some(Norm::default()), ..Text::default() };
        // These rows have the norm of the video.
        attention.after = Text { lengths: lengths(1)?, ..Text::default() };
        let table = if is_over_heads { vec![VIDEO, HEADS, HEAD_DIM / 2] } else { vec![VIDEO, HEAD_DIM / 2] };
        let angles = (wave(2.1, table, &device)? * 3.0)?;
        attention.rope = Some(Rope { cos: angles.cos()?, sin: angles.sin()? });
        let dtype = if dtype == Dtype::Bf16 { DType::BF16 } else { DType::F16 };
        let qkv = [0.7, 1.3, 0.2].map(|seed| rows(seed, (BATCH, S, HEADS, HEAD_DIM), dtype, &device));
        let [q, k, v] = qkv;
        Ok(Case { attention, qkv: [q?, k?, v?], angles })
    }

    pub fn bf16() -> Result<Case> {
        Case::new(Dtype::Bf16, NormKind::Rms, NormOver::Head, Pairs::Interleaved)
    }

    pub fn forward(&self) -> Result<Tensor> {
        let [q, k, v] = &self.qkv;
        self.attention.forward(q, k, v)
    }

    /// The output and the log-sum-exp, from candle's ops on the CPU.
    pub fn plain(&self, types: [[u32; HEADS]; BATCH]) -> Result<[Tensor; 2]> {
        let [q, k, v] = self.qkv.each_ref().map(on_the_cpu);
        let norms = |side: fn(&Text) -> &Option<Norm>, video: &'_ Norm| {
            [&self.attention.before, &self.attention.after].map(|text| side(text).clone().unwrap_or(video.clone()))
        };
        let (q_video, k_video) = (&self.attention.q_norm, &self.attention.k_norm);
        let q = self.prepared(&q?, q_video, norms(|text| &text.q_norm, q_video))?;
        let k = self.prepared(&k?, k_video, norms(|text| &text.k_norm, k_video))?;
        attended(&q, &k, &v?.transpose(1, 2)?.contiguous()?, &mask(types)?)
    }

    /// Normalised and rotated rows, \[B, H, S, D\].
    fn prepared(&self, x: &Tensor, video: &Norm, [before, after]: [Norm; 2]) -> Result<Tensor> {
        let norm = self.attention.spec().qk_norm.as_ref().expect("the spec has a norm");
        let mean = |x: &Tensor| if norm.over == NormOver::Heads { x.mean_keepdim((2, 3)) } else { x.mean_keepdim(3) };
        let x = if norm.kind == NormKind::Layer { x.broadcast_sub(&mean(x)?)? } else { x.clone() };
        let x = x.broadcast_div(&(mean(&x.sqr()?)? + EPS)?.sqrt()?)?;
        let affine = |start: usize, length: usize, norm: &Norm| -> Result<Tensor> {
            let mut x = x.narrow(1, start, length)?;
            if let Some(weight) = &norm.weight {
                x = x.broadcast_mul(&on_the_cpu(weight)?.reshape(((), HEAD_DIM))?)?;
            }
            if let Some(bias) = &norm.bias {
                x = x.broadcast_add(&on_the_cpu(bias)?.reshape(((), HEAD_DIM))?)?;
            }
            Ok(x)
        };
        let rotated = self.rotated(&affine(BEFORE, VIDEO, video)?)?;
        let parts = [affine(0, BEFORE, &before)?, rotated, affine(BEFORE + VIDEO, AFTER, &after)?];
        Tensor::cat(&parts, 1)?.transpose(1, 2)?.contiguous()
    }

    fn rotated(&self, x: &Tensor) -> Result<Tensor> {
        let half = HEAD_DIM / 2;
        let is_half = self.attention.spec().rope.as_ref().is_some_and(|rope| rope.pairs == Pairs::Half);
        // Pairs are channels 2i and 2i + 1, or i and i + D/2.
        let (split, pair) =
            if is_half { ((BATCH, VIDEO, HEADS, 2, half), 3) } else { ((BATCH, VIDEO, HEADS, half, 2), 4) };
        let x = x.contiguous()?.reshape(split)?;
        let (a, b) = (x.narrow(pair, 0, 1)?.squeeze(pair)?, x.narrow(pair, 1, 1)?.squeeze(pair)?);
        // [VIDEO, D/2], for each batch item or for each head.
        let angles = on_the_cpu(&self.angles)?;
        let angles = match *angles.dims() {
            [BATCH, VIDEO, _] => angles.unsqueeze(2)?,
            [VIDEO, HEADS, _] => angles.unsqueeze(0)?,
            _ => angles.unsqueeze(0)?.unsqueeze(2)?,
        };
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::stack(&[first, second], pair)?.reshape((BATCH, VIDEO, HEADS, HEAD_DIM))
    }
}

/// A tensor in f32 on the CPU, where no GPU has a part in what its results are compared with.
pub fn on_the_cpu(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)
}

/// Softmax attention of \[B, H, S, D\], with `mask` added to the scores: the output, \[B, S, H, D\],
/// and the log-sum-exp.
pub fn attended(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<[Tensor; 2]> {
    let scale = (q.dim(D::Minus1)? as f64).powf(-0.5);
    let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(mask)?;
    let highest = scores.max_keepdim(D::Minus1)?;
    let weights = scores.broadcast_sub(&highest)?.exp()?;
    let sums = weights.sum_keepdim(D::Minus1)?;
    let out = weights.broadcast_div(&sums)?.matmul(v)?;
    Ok([out.transpose(1, 2)?, (sums.log()? + highest)?.squeeze(D::Minus1)?])
}

/// What is added to the scores, \[B, H, S, S\]: minus infinity where a key is not seen.
///
/// A query sees valid text, and is seen everywhere when it is text itself. Video tokens see each
/// other when their positions differ by less than the half width.
fn mask(types: [[u32; HEADS]; BATCH]) -> Result<Tensor> {
    let token = |row: usize| (BEFORE..BEFORE + VIDEO).contains(&row).then(|| row - BEFORE);
    let mut values = Vec::with_capacity(BATCH * HEADS * S * S);
    for (item, types) in types.iter().enumerate() {
        for head_type in types {
            let position = |token: usize| match head_type {
                2 => token % FRAME_TOKENS * FRAMES + token / FRAME_TOKENS,
                _ => token,
            };
            let half_width = [usize::MAX, HALF_WIDTHS[0], HALF_WIDTHS[1]][*head_type as usize];
            for row in 0..S {
                values.extend((0..S).map(|key| {
                    let is_near = match (token(row), token(key)) {
                        (Some(a), Some(b)) => position(a).abs_diff(position(b)) < half_width,
                        _ => true,
                    };
                    if is_valid(item, key) && is_near { 0.0 } else { f32::NEG_INFINITY }
                }));
            }
        }
    }
    Tensor::from_vec(values, (BATCH, HEADS, S, S), &Device::Cpu)
}

/// Whether a row holds something.
pub fn is_valid(item: usize, row: usize) -> bool {
    row < LENGTHS[0][item] as usize || (BEFORE..BEFORE + VIDEO + LENGTHS[1][item] as usize).contains(&row)
}

/// The largest difference among valid rows of \[B, S, ...\].
pub fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    let difference = (on_the_cpu(a)? - on_the_cpu(b)?)?.abs()?.flatten_from(2)?.max(D::Minus1)?;
    let rows = difference.to_vec2::<f32>()?;
    let valid = rows.iter().enumerate().flat_map(|(item, rows)| {
        rows.iter().enumerate().filter(move |&(row, _)| is_valid(item, row)).map(|(_, difference)| *difference)
    });
    // NaN is larger than any number here.
    Ok(valid.fold(0.0, |most, difference| if difference <= most { most } else { difference }))
}

/// The bits of a tensor.
pub fn bits(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

pub const MIXED: [[u32; HEADS]; BATCH] = [[1, 2, 0], [2, 0, 1]];

/// V is at most 1. Weights in bf16 have an error of 2^-9, scores one of a few times as much.
pub const BF16: f32 = 0.015;
