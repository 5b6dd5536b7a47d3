//! Random numbers that depend on a seed and nothing else.

use framestride::shapes::spec::{Dtype, Spec};
use half::f16;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// What [`quick_generator`] draws bits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drawn {
    Q = 0,
    K = 1,
    V = 2,
    Angles = 3,
    Codes = 4,
    Parts = 5,
    Quiet = 6,
}

/// The stream of [`row_generator`] that [`Normals`] come from. No row has this number.
const NORMALS: u64 = u64::MAX - 1;

/// A generator for one row. A row gets the same values whatever the number of threads is.
pub fn row_generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    generator
}

/// A quicker generator, for where billions of bits are drawn. It gives other bits for each thing
/// that is drawn.
pub(crate) fn quick_generator(seed: u64, drawn: Drawn, index: u64) -> Xoshiro256PlusPlus {
    // With an odd factor, the rows of one seed are not those of the next.
    let key = seed.wrapping_mul(0xd6e8_feb8_6659_fd93).wrapping_add((drawn as u64) << 56).wrapping_add(index);
    Xoshiro256PlusPlus::seed_from_u64(key)
}

/// A standard normal value.
pub fn normal(generator: &mut ChaCha8Rng) -> f64 {
    StandardNormal.sample(generator)
}

/// Random weights or biases of a QK-norm around `centre`, for a launch of `heads` heads.
pub(crate) fn norm_weights(spec: &Spec, heads: usize, centre: f64, generator: &mut ChaCha8Rng) -> Vec<f32> {
    (0..spec.norm_length(heads as u32)).map(|_| (centre + 0.2 * normal(generator)) as f32).collect()
}

/// Standard normal values to pick from.
///
/// A layer at full size has billions of elements. To draw each on its own would take longer than
/// everything else.
pub(crate) struct Normals {
    /// About as many as there are 16-bit numbers of that size, and few enough for the fastest
    /// cache.
    values: [f32; 1 << 12],
    dtype: Dtype,
    seed: u64,
    /// The size of elements whose mean square is the eps of the norm.
    eps_size: f32,
}

impl Normals {
    pub fn new(spec: &Spec, seed: u64) -> Normals {
        let mut generator = row_generator(seed, NORMALS);
        let eps = spec.qk_norm.as_ref().map_or(1e-6, |norm| norm.eps);
        let values = std::array::from_fn(|_| normal(&mut generator) as f32);
        Normals { values, dtype: spec.dtype, seed, eps_size: eps.sqrt() as f32 }
    }

    /// The size of all elements of Q and K, for an eighth of the tokens. It is zero, or so small
    /// that the eps of a norm counts beside the mean square. A norm would hide any other size.
    fn quiet_size(&self, token: usize) -> Option<f32> {
        let picked: u32 = quick_generator(self.seed, Drawn::Quiet, token as u64).random_range(0..32);
        [0.0, 0.5, 1.0, 2.0].get(picked as usize).map(|part| part * self.eps_size)
    }

    /// The value that random bits stand for.
    pub fn pick(&self, bits: u16) -> f32 {
        self.values[usize::from(bits) % self.values.len()]
    }

    /// Draws the bits of token `index` of Q, K or V, `[heads, head_dim]`, as
    /// [`Inputs::random`](crate::tensors::Inputs::random) describes them.
    pub fn token(&self, drawn: Drawn, index: usize, head_dim: usize, bits: &mut [u16]) {
        let mut generator = quick_generator(self.seed, drawn, index as u64);
        // 64 random bits make four elements. The head dim is a multiple of four.
        for bits in bits.as_chunks_mut::<4>().0 {
            let random = generator.random::<u64>();
            *bits = [0, 16, 32, 48].map(|shift| (random >> shift) as u16);
        }
        let quiet = (drawn != Drawn::V).then(|| self.quiet_size(index)).flatten();
        for row in bits.chunks_exact_mut(head_dim) {
            let (mut centre, mut size) = (0.0, 1.0);
            if let Some(quiet) = quiet {
                size = quiet;
            } else if drawn != Drawn::V {
                let picks: [u16; 2] = generator.random();
                let picks = picks.map(|bits| 0.25 * self.pick(bits));
                (centre, size) = (picks[0], 2.0 * picks[1].exp());
            }
            for bits in row {
                let value = centre + size * self.pick(*bits);
                *bits = match self.dtype {
                    // The lower bits are cut off: rounding would take a branch that nobody can
                    // predict.
                    Dtype::Bf16 => (value.to_bits() >> 16) as u16,
                    Dtype::F16 => f16::from_f32(value).to_bits(),
                };
            }
        }
    }

    /// Draws the row that a video token has of its own in one head. It is the same for Q, K and V.
    pub fn own(&self, head: usize, video: usize, values: &mut [f64]) {
        let mut generator = quick_generator(self.seed, Drawn::Parts, (head as u64) << 32 | video as u64);
        values.fill_with(|| f64::from(self.pick(generator.random())));
    }

    /// Draws the row that stands for a frame or a patch in one head.
    pub fn code(&self, head: usize, code: usize, values: &mut [f64]) {
        let mut generator = quick_generator(self.seed, Drawn::Codes, (head as u64) << 32 | code as u64);
        values.fill_with(|| 2.0 * f64::from(self.pick(generator.random())));
    }
}
