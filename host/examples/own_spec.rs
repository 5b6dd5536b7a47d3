//! A spec that is made in code, with everything that a layer can be given: QK-norm, RoPE, text of
//! different lengths, and a half width and a seed of this call. One row is computed again here, in
//! the plainest way. It runs in the emulator.
//!
//! ```text
//! cargo run --release --example own_spec
//! ```

use framestride::shapes::layout::HeadType;
use framestride::shapes::params::{NormWeights, Tensor};
use framestride::shapes::spec::{NormKind, NormOver, Pairs, QkNorm, Rope, Width};
use framestride::{Device, HeadTypes, Layer, Module, SparseAttention, Spec, Stream, Text, Workspace};

const HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const FRAMES: usize = 5;
const FRAME_TOKENS: usize = 30;
const VIDEO: usize = FRAMES * FRAME_TOKENS;
const TEXT: usize = 20;
const S: usize = VIDEO + TEXT;
/// Valid text tokens of the two batch items.
const LENGTHS: [u32; 2] = [20, 7];
const EPS: f64 = 1e-6;
/// Half widths in tokens: two frames less a few patches, and ten patches.
const SPATIAL: usize = 2 * FRAME_TOKENS - 8;
const TEMPORAL: usize = 10 * FRAMES;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let spec = Spec::builder()
        .name("own_spec")
        .frames(FRAMES as u32)
        .tokens_per_frame(FRAME_TOKENS as u32)
        .after(TEXT as u32)
        .heads(HEADS as u32)
        .head_dim(HEAD_DIM as u32)
        .qk_norm(QkNorm { kind: NormKind::Rms, over: NormOver::Head, eps: EPS })
        .rope(Rope { pairs: Pairs::Interleaved, channels: 64, before: false, after: false, per_head: false })
        .spatial(Width::Density(0.5))
        .temporal(Width::Density(0.5))
        .build()?;
    let device = Device::emulator();
    let module = Module::load(&device, &spec)?;
    let batch = LENGTHS.len();
    let attention = SparseAttention::new(&module, batch as u32, HEADS as u32)?;
    let workspace = Workspace::allocate(&device, attention.workspace_bytes())?;

    // Q, K and V are [B, S, H, D]: the video, then the text. Weights of the norms are [D], and the
    // tables of RoPE have a row for each token of the video and a column for each pair of channels.
    let rows = |seed: f64| -> Vec<f64> { (0..batch * S * HEADS * HEAD_DIM).map(|i| round(wave(i, seed))).collect() };
    let (q, k, v) = (rows(0.7), rows(1.3), rows(0.2));
    let q_weight: Vec<f64> = (0..HEAD_DIM).map(|i| 1.0 + 0.5 * wave(i, 0.9)).collect();
    let k_weight: Vec<f64> = (0..HEAD_DIM).map(|i| 1.0 + 0.5 * wave(i, 0.4)).collect();
    let angles: Vec<f64> = (0..VIDEO * HEAD_DIM / 2).map(|i| wave(i, 2.1)).collect();
    let (cos, sin) = (angles.iter().map(|a| a.cos()).collect::<Vec<_>>(), angles.iter().map(|a| a.sin()).collect());

    let [q_memory, k_memory, v_memory] = [&q, &k, &v].map(|values| device.upload(&bf16(values)));
    let (q_memory, k_memory, v_memory) = (q_memory?, k_memory?, v_memory?);
    let [q_norm, k_norm, cos_memory, sin_memory] =
        [&q_weight, &k_weight, &cos, &sin].map(|values| device.upload(&f32_bytes(values)));
    let (q_norm, k_norm, cos_memory, sin_memory) = (q_norm?, k_norm?, cos_memory?, sin_memory?);
    let lengths = device.upload(&LENGTHS.map(u32::to_le_bytes).concat())?;
    let out = device.allocate(q_memory.bytes())?;

    let tensor = |data: u64| Tensor {
        data,
        batch: (S * HEADS * HEAD_DIM) as u64,
        row: (HEADS * HEAD_DIM) as u64,
        head: HEAD_DIM as u64,
    };
    let norm = |weight: u64| NormWeights { weight, bias: 0 };
    let layer = Layer {
        q: tensor(q_memory.address()),
        k: tensor(k_memory.address()),
        v: tensor(v_memory.address()),
        out: tensor(out.address()),
        q_norm: norm(q_norm.address()),
        k_norm: norm(k_norm.address()),
        // The norm of the text has no weights here, so they are ones. Without `Some`, it would be the
        // norm of the video.
        after: Text { lengths: lengths.address(), q_norm: Some(norm(0)), k_norm: Some(norm(0)), ..Text::default() },
        cos: cos_memory.address(),
        sin: sin_memory.address(),
        // This call has half widths of its own, and samples other rows than the spec says.
        half_widths: Some([SPATIAL as u32, TEMPORAL as u32]),
        seed: Some(1),
        ..Layer::default()
    };
    // SAFETY: the addresses are memory of this device, of the sizes that the spec asks for, and live
    // until the end.
    unsafe { attention.forward(Stream::DEFAULT, &layer, HeadTypes::Profiled, &workspace)? };
    let profile = attention.read_profile(&workspace)?;
    for head in &profile {
        println!("batch {}, head {}: {}, errors {:?}", head.batch, head.head, head.head_type.name(), head.errors);
    }
    let found: Vec<f64> = device
        .read(&out, 0, out.bytes())?
        .as_chunks()
        .0
        .iter()
        .map(|&bytes| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)))
        .collect();

    // A spatial head counts video tokens frame by frame, and a temporal head patch by patch. Text sees
    // and is seen everywhere.
    let is_seen = |head_type: HeadType, row: usize, key: usize| {
        let position = |token: usize| match head_type {
            HeadType::Temporal => token % FRAME_TOKENS * FRAMES + token / FRAME_TOKENS,
            _ => token,
        };
        let half_width = if head_type == HeadType::Temporal { TEMPORAL } else { SPATIAL };
        row.max(key) >= VIDEO || position(row).abs_diff(position(key)) < half_width
    };
    for (item, head, row) in [(0, 0, 3), (0, 1, VIDEO - 1), (1, 0, VIDEO + 6)] {
        let at = |row: usize| ((item * S + row) * HEADS + head) * HEAD_DIM;
        let normed = |x: &[f64], weight: &[f64], row: usize| -> Vec<f64> {
            let x = &x[at(row)..][..HEAD_DIM];
            let factor = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / HEAD_DIM as f64 + EPS).sqrt();
            if row >= VIDEO {
                return x.iter().map(|x| x * factor).collect();
            }
            let y: Vec<f64> = x.iter().zip(weight).map(|(x, weight)| x * factor * weight).collect();
            let pair = |i: usize| angles[row * HEAD_DIM / 2 + i];
            (0..HEAD_DIM / 2)
                .flat_map(|i| {
                    let (a, b, (sin, cos)) = (y[2 * i], y[2 * i + 1], pair(i).sin_cos());
                    [a * cos - b * sin, b * cos + a * sin]
                })
                .collect()
        };
        let head_type = profile[item * HEADS + head].head_type;
        let query = normed(&q, &q_weight, row);
        let (mut sum, mut expected) = (0.0, vec![0.0; HEAD_DIM]);
        for key in (0..VIDEO + LENGTHS[item] as usize).filter(|&key| is_seen(head_type, row, key)) {
            let product: f64 = query.iter().zip(normed(&k, &k_weight, key)).map(|(q, k)| q * k).sum();
            let weight = (product / (HEAD_DIM as f64).sqrt()).exp();
            sum += weight;
            for (expected, v) in expected.iter_mut().zip(&v[at(key)..]) {
                *expected += weight * v;
            }
        }
        for (channel, (found, expected)) in found[at(row)..].iter().zip(&expected).enumerate() {
            let expected = expected / sum;
            assert!((found - expected).abs() < 0.02, "row {row}, channel {channel}: {found}, not {expected}");
        }
    }
    let invalid = (S + VIDEO + LENGTHS[1] as usize) * HEADS * HEAD_DIM;
    assert!(found[invalid..].iter().all(|&x| x == 0.0), "rows of invalid text are zero");
    println!("three rows agree with a plain computation, and rows of invalid text are zero");
    Ok(())
}

/// Some number of -1 to 1.
fn wave(index: usize, seed: f64) -> f64 {
    ((index as f64 + 1.0) * (index % 97 + 1) as f64 * seed).sin()
}

/// A number that bf16 holds.
fn round(value: f64) -> f64 {
    f64::from(f32::from_bits((value as f32).to_bits() & 0xffff_0000))
}

fn bf16(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|&value| ((value as f32).to_bits() >> 16).to_le_bytes()[..2].to_owned()).collect()
}

fn f32_bytes(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs() -> Result<(), Box<dyn std::error::Error>> {
        super::main()
    }
}
