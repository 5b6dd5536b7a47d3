//! What a block works on at a time: one query tile of one head.

use super::order;
use crate::cuda::global;
use crate::masks::band::Band;
use crate::model::{Model, valid_text};
use framestride_shapes::layout::{HeadType, ValidText};
use framestride_shapes::params::AttentionParams;

/// One query tile of one head.
pub struct Work<M> {
    /// The head, counted over batch x heads.
    pub head: u32,
    /// How the head attends.
    pub head_type: HeadType,
    /// Valid text tokens of the head's batch item.
    pub valid: ValidText,
    /// Packed row of its first query.
    pub first_row: u32,
    /// What the query tile sees.
    pub mask: Band<M>,
}

impl<M: Model> Work<M> {
    /// Query tile `index` of a launch.
    ///
    /// # Safety
    /// `params` is as its documentation says.
    #[inline(always)]
    pub unsafe fn at(params: &AttentionParams, index: u32) -> Work<M> {
        let (head, tile) = order::head_and_tile::<M>(params, index);
        let head_type = if params.head_types == 0 {
            HeadType::Dense
        } else {
            HeadType::from_u32(global::load_u32(params.head_types + head as u64 * 4))
        };
        let valid = valid_text::<M>(params.before_lengths, params.after_lengths, head / params.heads);
        let first_row = tile * M::TILES.query_rows;
        Work {
            head,
            head_type,
            valid,
            first_row,
            mask: Band::new(params.half_widths(), head_type, valid.sum(), first_row),
        }
    }
}
