//! The inputs of one layer on the host: Q, K, V and what goes with them.

use std::ops::Range;

use framestride::call::{check_heads, check_scale};
use framestride::shapes::layout::{Layout, ValidText};
use framestride::shapes::spec::{Dtype, NormKind, Spec};
use framestride::{Error, Result};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::reference::Operand;
use crate::rope::RopeTables;

/// A contiguous `[batch, rows, heads, head_dim]` tensor of 16-bit elements, whose rows are in the
/// model's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Type of the elements: the spec's.
    pub dtype: Dtype,
    /// Batch items.
    pub batch: usize,
    /// Tokens of the sequence.
    pub rows: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a row.
    pub head_dim: usize,
    /// The elements' bits.
    pub bits: Vec<u16>,
}

/// Bytes of an element. [`Tokens`] holds the bits of types of this size.
pub(crate) const ELEMENT: usize = size_of::<u16>();
const _: () = assert!(Dtype::Bf16.bytes() as usize == ELEMENT && Dtype::F16.bytes() as usize == ELEMENT);

/// The 16 bits of the nearest value of a type. Of two equally near, it is the one whose last bit is
/// 0.
pub fn narrow(dtype: Dtype, value: f64) -> u16 {
    match dtype {
        Dtype::Bf16 => bf16::from_f64(value).to_bits(),
        Dtype::F16 => f16::from_f64(value).to_bits(),
    }
}

/// The value of 16 bits.
pub fn widen(dtype: Dtype, bits: u16) -> f64 {
    match dtype {
        // f32 holds every 16-bit value, and processors have instructions for this way.
        Dtype::Bf16 => bf16::from_bits(bits).to_f32().into(),
        Dtype::F16 => f16::from_bits(bits).to_f32().into(),
    }
}

impl Tokens {
    /// A tensor of zeros.
    pub fn zeros(dtype: Dtype, [batch, rows, heads, head_dim]: [usize; 4]) -> Tokens {
        Tokens { dtype, batch, rows, heads, head_dim, bits: vec![0; batch * rows * heads * head_dim] }
    }

    /// The shape, `[batch, rows, heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        [self.batch, self.rows, self.heads, self.head_dim]
    }

    /// The shape of a tensor of some of the rows.
    pub(crate) fn shape_of(&self, rows: &Range<usize>) -> [usize; 4] {
        [self.batch, rows.len(), self.heads, self.head_dim]
    }

    /// Index of the first element of a row.
    pub fn index(&self, batch: usize, row: usize, head: usize) -> usize {
        ((batch * self.rows + row) * self.heads + head) * self.head_dim
    }

    /// The values of one row of one head.
    pub fn row(&self, batch: usize, row: usize, head: usize) -> Vec<f64> {
        let mut wide = vec![0.0; self.head_dim];
        self.widen(&self.bits[self.index(batch, row, head)..][..self.head_dim], &mut wide);
        wide
    }

    /// Index and value of the first element that is not finite.
    fn first_not_finite(&self) -> Option<([usize; 4], f64)> {
        let found = self.bits.par_iter().position_first(|&bits| !widen(self.dtype, bits).is_finite())?;
        let (token, element) = (found / (self.heads * self.head_dim), found % (self.heads * self.head_dim));
        let index = [token / self.rows, token % self.rows, element / self.head_dim, element % self.head_dim];
        Some((index, widen(self.dtype, self.bits[found])))
    }

    /// Writes the values of `bits`, which are elements of this tensor, to `wide`.
    pub fn widen(&self, bits: &[u16], wide: &mut [f64]) {
        for (wide, &bits) in wide.iter_mut().zip(bits) {
            *wide = widen(self.dtype, bits);
        }
    }

    /// Fills every row with what `row(batch, row, head, values)` writes to `values`, rounded. Rows
    /// are filled in parallel.
    pub fn fill(&mut self, row: impl Fn(usize, usize, usize, &mut [f64]) + Sync) {
        let (dtype, rows, heads, head_dim) = (self.dtype, self.rows, self.heads, self.head_dim);
        // A task fills all heads of a token, since one row is too little work for the scheduler.
        self.bits.par_chunks_exact_mut(heads * head_dim).enumerate().for_each_init(
            || vec![0.0; head_dim],
            |values, (token, bits)| {
                for (head, bits) in bits.chunks_exact_mut(head_dim).enumerate() {
                    row(token / rows, token % rows, head, values);
                    for (bits, value) in bits.iter_mut().zip(&*values) {
                        *bits = narrow(dtype, *value);
                    }
                }
            },
        );
    }

    /// One head of one batch item as f64, `[rows, head_dim]`.
    pub fn head(&self, batch: usize, head: usize) -> Vec<f64> {
        let mut rows = vec![0.0; self.rows * self.head_dim];
        rows.par_chunks_exact_mut(self.head_dim)
            .enumerate()
            .for_each(|(row, values)| self.widen(&self.bits[self.index(batch, row, head)..][..self.head_dim], values));
        rows
    }
}

/// The weights and biases of a QK-norm: `head_dim` elements, or heads x head_dim when the statistic
/// is over all heads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Norm {
    /// Ones are taken when none are given.
    pub weight: Option<Vec<f32>>,
    /// Zeros are taken when none are given. Only a layer norm has biases.
    pub bias: Option<Vec<f32>>,
}

/// The text on one side of the video.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Text {
    /// Whether these rows of Q, K and V are given to the kernels as tensors of their own.
    pub is_apart: bool,
    /// Valid tokens of each batch item, which come first. Without them, all are valid.
    pub lengths: Option<Vec<u32>>,
    /// QK-norm of these rows of Q. Without it, they get the norm of video rows.
    pub q_norm: Option<Norm>,
    /// QK-norm of these rows of K, likewise.
    pub k_norm: Option<Norm>,
}

/// Everything that one layer reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Inputs {
    /// Q as the projection left it: neither normalised nor rotated.
    pub q: Tokens,
    /// K, likewise.
    pub k: Tokens,
    /// V.
    pub v: Tokens,
    /// QK-norm of video rows of Q.
    pub q_norm: Norm,
    /// QK-norm of video rows of K.
    pub k_norm: Norm,
    /// The text before the video.
    pub before: Text,
    /// The text after the video.
    pub after: Text,
    /// The RoPE tables. They are given exactly when the spec has `[rope]`.
    pub rope: Option<RopeTables>,
    /// Softmax scale. Without it, 1 / sqrt(head_dim) is taken.
    pub scale: Option<f32>,
}

impl Inputs {
    /// Inputs whose norms have no weights, whose text is all valid, and whose scale is the default.
    pub fn new([q, k, v]: [Tokens; 3], rope: Option<RopeTables>) -> Inputs {
        let (q_norm, k_norm) = (Norm::default(), Norm::default());
        Inputs { q, k, v, q_norm, k_norm, before: Text::default(), after: Text::default(), rope, scale: None }
    }

    /// What files and messages call the text before the video and that after it. Where there is
    /// text on one side alone, that is `text`.
    pub const fn text_names(layout: &Layout) -> [&'static str; 2] {
        match (layout.before, layout.after) {
            (1.., 1..) => ["before", "after"],
            (1.., 0) => ["text", "after"],
            (0, _) => ["before", "text"],
        }
    }

    /// The norm weights of a side's text, or without that of video rows.
    pub fn norm<'a>(&'a self, operand: Operand, text: Option<&'a Text>) -> &'a Norm {
        match operand {
            Operand::Query => text.and_then(|text| text.q_norm.as_ref()).unwrap_or(&self.q_norm),
            Operand::Key => text.and_then(|text| text.k_norm.as_ref()).unwrap_or(&self.k_norm),
        }
    }

    /// All norms that are given, and their names.
    fn norms(&self, layout: &Layout) -> impl Iterator<Item = (String, &Norm)> {
        let sides = Inputs::text_names(layout).into_iter().zip([&self.before, &self.after]);
        let of_text = sides.flat_map(|(side, text)| {
            [(format!("q_norm_{side}"), text.q_norm.as_ref()), (format!("k_norm_{side}"), text.k_norm.as_ref())]
        });
        let all = [("q_norm".into(), Some(&self.q_norm)), ("k_norm".into(), Some(&self.k_norm))];
        all.into_iter().chain(of_text).filter_map(|(name, norm)| norm.map(|norm| (name, norm)))
    }

    /// Names the first element of each tensor that is not finite, such as "k[0, 17, 1, 5] is inf".
    pub fn not_finite(&self, layout: &Layout) -> Vec<String> {
        let tokens = [("q", &self.q), ("k", &self.k), ("v", &self.v)].into_iter().filter_map(|(key, tokens)| {
            tokens.first_not_finite().map(|(index, value)| format!("{key}{index:?} is {value}"))
        });
        let affine = self
            .norms(layout)
            .flat_map(|(key, norm)| [(format!("{key}.weight"), &norm.weight), (format!("{key}.bias"), &norm.bias)]);
        let affine = affine.filter_map(|(key, values)| values.as_ref().map(|values| (key, values)));
        let tables = self.rope.iter().flat_map(|rope| [("cos".to_owned(), &rope.cos), ("sin".to_owned(), &rope.sin)]);
        let floats = affine.chain(tables).filter_map(|(key, values)| {
            let found = values.par_iter().position_first(|value| !value.is_finite())?;
            Some(format!("{key}, element {found}, is {}", values[found]))
        });
        tokens.chain(floats).collect()
    }

    /// Valid text tokens of a batch item. A length beyond the text counts as all of it, as in the
    /// kernels.
    pub fn valid(&self, layout: &Layout, batch: usize) -> ValidText {
        let valid = |text: &Text, all: u32| text.lengths.as_ref().map_or(all, |lengths| lengths[batch].min(all));
        ValidText { before: valid(&self.before, layout.before), after: valid(&self.after, layout.after) }
    }

    /// Softmax scale.
    pub fn scale(&self) -> f64 {
        self.scale.map_or(1.0 / (self.q.head_dim as f64).sqrt(), f64::from)
    }

    /// What packed Q is multiplied by. Its products with packed K are then exponents of two.
    pub fn query_scale(&self) -> f64 {
        self.scale() * std::f64::consts::LOG2_E
    }

    /// Checks every shape against the spec. `source` names in errors where the inputs come from,
    /// such as a file.
    pub fn check(&self, spec: &Spec, source: &str) -> Result<()> {
        let [batch, _, heads, _] = self.q.shape();
        let shape = [batch, spec.layout.sequence() as usize, heads, spec.head_dim as usize];
        for (key, tokens) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            if tokens.shape() != shape || batch == 0 || heads == 0 {
                return Err(Error::input(
                    format!("{source}, tensor {key}"),
                    format!("shape {:?}", tokens.shape()),
                    format!(
                        "[batch, {}, heads, {}] for spec {}, the same for q, k and v",
                        shape[1], shape[3], spec.name
                    ),
                    "Give the tensors of the shape that the spec declares, or the spec of this model",
                ));
            }
        }
        check_heads(spec, heads, &format!("{source}, tensor q"))?;
        let elements = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
        for (key, tokens) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            if tokens.dtype != spec.dtype || Some(tokens.bits.len()) != elements {
                return Err(Error::input(
                    format!("{source}, tensor {key}"),
                    format!("{} elements of {}", tokens.bits.len(), tokens.dtype.as_str()),
                    format!("as many of {} as shape {shape:?} has", spec.dtype.as_str()),
                    "Make it with Tokens::zeros, and fill it",
                ));
            }
        }
        let norm_length = spec.qk_norm.map(|_| spec.norm_length(heads as u32) as usize);
        for (key, norm) in self.norms(&spec.layout) {
            for (part, values) in [("weight", &norm.weight), ("bias", &norm.bias)] {
                let Some(values) = values else { continue };
                let subject = format!("{source}, tensor {key}.{part}");
                let Some(length) = norm_length else {
                    return Err(Error::input(
                        subject,
                        "a norm",
                        "none: the spec has no [qk_norm]",
                        "Add [qk_norm] to the spec, or drop the tensor",
                    ));
                };
                if part == "bias" && spec.qk_norm.as_ref().is_some_and(|norm| norm.kind == NormKind::Rms) {
                    return Err(Error::input(
                        subject,
                        "a bias",
                        "none: an rms norm has no bias",
                        "Set qk_norm.kind = \"layer\" in the spec, or drop the tensor",
                    ));
                }
                if values.len() != length {
                    return Err(Error::input(
                        subject,
                        format!("{} elements", values.len()),
                        format!("{length} elements"),
                        "qk_norm.over in the spec says whether the norm is over one head or over all",
                    ));
                }
            }
        }
        match (&spec.rope, &self.rope) {
            (Some(_), Some(tables)) => {
                let shape = spec.rope_table_shape(heads as u32);
                let length = RopeTables::length(spec, heads);
                for (key, table) in [("cos", &tables.cos), ("sin", &tables.sin)] {
                    if ![1, batch].contains(&tables.items) || table.len() != tables.items * length {
                        return Err(Error::input(
                            format!("{source}, tensor {key}"),
                            format!("{} elements in {} tables", table.len(), tables.items),
                            format!("shape {shape:?}, once or for each of {batch} batch items"),
                            "The rows are the video rows, and those of text that the spec's rope rotates too; one table a head with rope.per_head = true",
                        ));
                    }
                }
            }
            (None, Some(_)) => {
                return Err(Error::input(
                    format!("{source}, tensors cos and sin"),
                    "RoPE tables",
                    "none: the spec has no [rope]",
                    "Add [rope] to the spec, or drop the tensors",
                ));
            }
            (Some(_), None) => {
                return Err(Error::input(
                    format!("{source}, tensors cos and sin"),
                    "nothing",
                    format!("f32 tables of shape {:?}: the spec has [rope]", spec.rope_table_shape(heads as u32)),
                    "Give both tables",
                ));
            }
            (None, None) => {}
        }
        if let Some(scale) = self.scale {
            check_scale(spec, scale)?;
        }
        let sides = [(&self.before, spec.layout.before), (&self.after, spec.layout.after)];
        for (name, (text, tokens)) in Inputs::text_names(&spec.layout).into_iter().zip(sides) {
            let Some(lengths) = &text.lengths else { continue };
            let longest = lengths.iter().copied().max().unwrap_or(0);
            if lengths.len() != batch || longest > tokens {
                return Err(Error::input(
                    format!("{source}, {name}_lengths"),
                    format!("{lengths:?}"),
                    format!("one length of at most {tokens} for each of {batch} batch items"),
                    "A length counts the valid text tokens, which come first among the text",
                ));
            }
        }
        Ok(())
    }
}
