//! Pictures of masks: which key tiles each query tile reads.

use framestride_shapes::arch::Arch;
use framestride_shapes::layout::{HeadType, Layout};
use framestride_shapes::spec::Spec;
use framestride_shapes::tiling::key_tile;
use image::Rgb;
use rayon::prelude::*;

use crate::Picture;

/// What becomes of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Skipped,
    Full,
    Edge,
}

/// The tiles of one head type. All text is valid.
struct Tiling<'a> {
    spec: &'a Spec,
    head: HeadType,
}

impl Tiling<'_> {
    /// What becomes of the tile that a pair of packed rows lies in.
    fn fate(&self, query: u32, key: u32) -> Fate {
        let Tiling { spec, head } = *self;
        match key_tile(&spec.layout, head, spec.tiles(Arch::default()), spec.layout.text_tokens(), query, key) {
            Some(tile) if tile.full => Fate::Full,
            Some(_) => Fate::Edge,
            None => Fate::Skipped,
        }
    }

    /// The colour of a pair of packed rows.
    fn colour(&self, query: u32, key: u32) -> Rgb<u8> {
        let seen = self.spec.layout.visible(self.head, query, self.spec.layout.text_tokens()).sees(key);
        match (self.fate(query, key), seen) {
            (Fate::Full, _) => FULL,
            (Fate::Edge, true) => EDGE_SEEN,
            (Fate::Edge, false) => EDGE_HIDDEN,
            (Fate::Skipped, _) => SKIPPED,
        }
    }
}

const SKIPPED: Rgb<u8> = Rgb([38, 44, 56]);
const FULL: Rgb<u8> = Rgb([42, 157, 143]);
const EDGE_SEEN: Rgb<u8> = Rgb([244, 196, 92]);
const EDGE_HIDDEN: Rgb<u8> = Rgb([160, 92, 60]);

/// The order of the rows and columns of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Model,
    Packed,
}

/// The side of a picture in pixels, and how many samples a pixel takes along each axis where it
/// covers several tokens.
const SIDE: u32 = 480;
const SAMPLES: u32 = 3;

fn draw_mask(picture: &mut Picture, left: u32, top: u32, tiling: &Tiling, order: Order) {
    let (layout, sequence) = (&tiling.spec.layout, u64::from(tiling.spec.layout.sequence()));
    let samples = if sequence <= u64::from(SIDE) { 1 } else { SAMPLES };
    let packed = |by: &Layout, pixel: u32, sample: u32| {
        let row = (u64::from(pixel * samples + sample) * sequence / u64::from(SIDE * samples)) as u32;
        match order {
            Order::Model => by.packed_row(tiling.head, row, layout.all_text()),
            Order::Packed => row,
        }
    };
    let keys: Vec<u32> = (0..SIDE * samples).map(|x| packed(layout, x / samples, x % samples)).collect();
    let rows: Vec<Vec<Rgb<u8>>> = (0..SIDE)
        .into_par_iter()
        .map(|y| {
            let pixel = |x: u32| {
                let mut sum = [0u32; 3];
                for query in 0..samples {
                    let query = packed(&layout.query_order(), y, query);
                    for &key in &keys[(x * samples) as usize..][..samples as usize] {
                        let colour = tiling.colour(query, key).0;
                        (0..3).for_each(|channel| sum[channel] += u32::from(colour[channel]));
                    }
                }
                Rgb(sum.map(|sum| (sum / (samples * samples)) as u8))
            };
            (0..SIDE).map(pixel).collect()
        })
        .collect();
    for (y, row) in (0..).zip(rows) {
        for (x, colour) in (0..).zip(row) {
            picture.put_pixel(left + x, top + y, colour);
        }
    }
}

/// A picture of the masks of `heads`. Each type has a row, in model order on the left and in packed
/// order on the right. Queries go down, keys go to the right.
pub fn picture(spec: &Spec, heads: &[HeadType]) -> Picture {
    const MARGIN: u32 = 16;
    const LINE: u32 = 18;
    let block = SIDE + 2 * LINE;
    let mut picture =
        Picture::new(3 * MARGIN + 2 * SIDE, 2 * MARGIN + 2 * LINE + heads.len() as u32 * (block + MARGIN));
    let layout = &spec.layout;
    picture.text(
        MARGIN,
        MARGIN,
        &format!(
            "{}: {} frames x {} tokens, {} text, {} sink frames; query tiles of {}, key tiles of {} rows",
            spec.name,
            layout.frames.value,
            layout.tokens_per_frame.value,
            layout.text_tokens(),
            layout.sink_frames,
            spec.tiles(Arch::default()).query_rows,
            spec.tiles(Arch::default()).key_rows
        ),
    );
    let mut x = MARGIN;
    for (colour, label) in
        [(SKIPPED, "skipped"), (FULL, "full tile"), (EDGE_SEEN, "edge tile, seen"), (EDGE_HIDDEN, "edge tile, hidden")]
    {
        picture.rectangle(x, MARGIN + LINE + 2, 10, 10, colour);
        picture.text(x + 15, MARGIN + LINE, label);
        x += 15 + 7 * label.len() as u32 + 24;
    }
    for (index, &head) in (0..).zip(heads) {
        let tiling = Tiling { spec, head };
        let counts = spec.tile_counts(Arch::default(), head);
        let top = 2 * MARGIN + 2 * LINE + index * (block + MARGIN);
        picture.text(
            MARGIN,
            top,
            &format!(
                "{}: half width {} tokens, density {:.4}; {} tiles skipped, {} full, {} on an edge",
                head.name(),
                layout.half_width(head),
                spec.density(head),
                counts.skipped,
                counts.full,
                counts.edge
            ),
        );
        for (column, order, label) in [(0, Order::Model, "model order"), (1, Order::Packed, "packed order")] {
            let left = MARGIN + column * (SIDE + MARGIN);
            picture.text(left, top + LINE, label);
            draw_mask(&mut picture, left, top + 2 * LINE, &tiling, order);
        }
    }
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every visible pair lies in a tile that is read, and full tiles hold no hidden pair.
    #[test]
    fn fates_agree_with_the_rule() {
        for (name, text) in framestride_shapes::models() {
            if !name.starts_with("tiny") {
                continue;
            }
            let spec = Spec::parse(name, text).expect("a shipped spec");
            for head in HeadType::ALL {
                let tiling = Tiling { spec: &spec, head };
                for query in (0..spec.layout.sequence()).step_by(7) {
                    let visible = spec.layout.visible(head, query, spec.layout.text_tokens());
                    for key in 0..spec.layout.sequence() {
                        match tiling.fate(query, key) {
                            Fate::Skipped => assert!(!visible.sees(key), "{name} {head:?} {query} {key}"),
                            Fate::Full => assert!(visible.sees(key), "{name} {head:?} {query} {key}"),
                            Fate::Edge => {}
                        }
                    }
                }
            }
        }
    }
}
