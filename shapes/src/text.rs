//! Names and messages for people, of which any part may come from a damaged or hostile file.

use std::borrow::Cow;

/// Most bytes of an error message.
pub const MESSAGE_BYTES: usize = 2000;

/// Text that a terminal shows and does not obey, of at most `most` bytes (64 or more).
///
/// Control characters are escaped, all but line ends. So are marks that turn the direction of
/// writing. A text that is too long is shortened in its middle.
pub fn plain(text: &str, most: usize) -> Cow<'_, str> {
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_plain = |c: char| c == '\n' || !(c.is_control() || turns(c));
    if text.len() <= most && text.chars().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let escape = |c: char| if is_plain(c) { c.to_string() } else { c.escape_default().to_string() };
    // One half is from the start, and one from the end. Between them stands the number of bytes
    // that are left out, in at most 32 bytes.
    let half = (most - 32) / 2;
    let (mut rest, mut head, mut tail) = (text.chars(), String::new(), Vec::new());
    while let Some(piece) = rest.clone().next().map(escape).filter(|piece| head.len() + piece.len() <= half) {
        rest.next();
        head += &piece;
    }
    let mut tail_bytes = 0;
    while let Some(piece) = rest.clone().next_back().map(escape).filter(|piece| tail_bytes + piece.len() <= half) {
        rest.next_back();
        tail_bytes += piece.len();
        tail.push(piece);
    }
    let left_out = rest.as_str().len();
    if left_out > 0 {
        head += &format!("[... {left_out} bytes ...]");
    }
    tail.iter().rev().for_each(|piece| head += piece);
    Cow::Owned(head)
}

/// The name that was meant, if one of the known ones is at most two edits away, and these are at most
/// half of its characters.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const EDITS: usize = 2;
    known
        .into_iter()
        // A character has at most four bytes.
        .filter(|known| known.len().abs_diff(name.len()) <= 4 * EDITS)
        .map(|known| (edits(known, name), known))
        .filter(|&(edits, known)| edits <= EDITS && 2 * edits <= known.chars().count())
        .min_by_key(|&(edits, _)| edits)
        .map(|(_, known)| known)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = core::mem::replace(&mut row[0], i + 1);
        for (j, b) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.chars().count()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_are_short_and_plain() {
        assert!(matches!(plain("two\nlines, ä", 64), Cow::Borrowed("two\nlines, ä")));
        assert_eq!(plain("\u{1b}[31m\t\u{7f}\u{9b}\r", 64), r"\u{1b}[31m\t\u{7f}\u{9b}\r");
        assert_eq!(plain("abc\u{202e}def", 64), r"abc\u{202e}def");
        assert_eq!(plain(&"a".repeat(1000), 64), "aaaaaaaaaaaaaaaa[... 968 bytes ...]aaaaaaaaaaaaaaaa");
    }

    proptest! {
        #[test]
        fn any_text_is_made_plain(text in any::<String>(), times in 1usize..200, most in 64usize..300) {
            let text = text.repeat(times);
            let shown = plain(&text, most);
            prop_assert!(shown.len() <= most, "{}", shown.len());
            prop_assert!(shown.chars().all(|c| c == '\n' || !c.is_control()));
        }
    }

    #[test]
    fn names_that_were_meant() {
        let known = ["q", "cos", "kind", "q_norm.weight", "text_lengths"];
        for (name, meant) in [
            ("q_norm.wieght", Some("q_norm.weight")),
            ("text_length", Some("text_lengths")),
            ("co", Some("cos")),
            ("knid", Some("kind")),
            ("foo", None),
            ("Q", None),
            ("masks", None),
            ("", None),
        ] {
            assert_eq!(nearest(name, known), meant, "{name}");
        }
        assert_eq!(nearest(&"q".repeat(100_000_000), known), None);
    }
}
