//! The rule of visibility as the design words it, for tests: no code of `layout`.

use framestride_shapes::layout::{HeadType, Layout, ValidText};

/// A token of the model's sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Text token before the video, counted from the first.
    Before(u32),
    /// Text token after the video, counted from the first.
    After(u32),
    /// Video token: frame and place in it.
    Video(u32, u32),
}

/// The token at a row of the model's order.
pub fn token(layout: &Layout, row: u32) -> Token {
    let video = layout.frames.value * layout.tokens_per_frame.value;
    match row.checked_sub(layout.before) {
        None => Token::Before(row),
        Some(row) if row >= video => Token::After(row - video),
        Some(row) => Token::Video(row / layout.tokens_per_frame.value, row % layout.tokens_per_frame.value),
    }
}

/// pos of a video token.
pub fn position(layout: &Layout, head: HeadType, frame: u32, place: u32) -> i64 {
    let (frame, place) = (i64::from(frame), i64::from(place));
    match head {
        HeadType::Dense | HeadType::Spatial => frame * i64::from(layout.tokens_per_frame.value) + place,
        HeadType::Temporal => place * i64::from(layout.frames.value) + frame,
    }
}

/// Whether the query at a row of the model's order sees the key at another, with a half width of
/// its own.
pub fn sees_with(layout: &Layout, head: HeadType, half_width: u32, query: u32, key: u32, valid: ValidText) -> bool {
    let (query, key) = (token(layout, query), token(layout, key));
    let invalid = |token| match token {
        Token::Before(text) => text >= valid.before,
        Token::After(text) => text >= valid.after,
        Token::Video(..) => false,
    };
    if invalid(query) || invalid(key) {
        return false;
    }
    match (query, key) {
        (Token::Before(_) | Token::After(_), _) | (_, Token::Before(_) | Token::After(_)) => true,
        (Token::Video(..), Token::Video(frame, _)) if frame < layout.sink_frames => true,
        (Token::Video(query_frame, query_place), Token::Video(key_frame, key_place)) => {
            let distance =
                position(layout, head, query_frame, query_place) - position(layout, head, key_frame, key_place);
            head == HeadType::Dense || distance.abs() < i64::from(half_width)
        }
    }
}

/// [`sees_with`] the layout's own half width.
pub fn sees(layout: &Layout, head: HeadType, query: u32, key: u32, valid: ValidText) -> bool {
    let half_width = match head {
        HeadType::Dense => 0,
        HeadType::Spatial => layout.spatial_half_width,
        HeadType::Temporal => layout.temporal_half_width,
    };
    sees_with(layout, head, half_width, query, key, valid)
}
