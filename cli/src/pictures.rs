//! The pictures of a layer that was run: what its heads look at, and their masks.

use std::path::{Path, PathBuf};

use framestride::Result;
use framestride::shapes::layout::HeadType;
use framestride::shapes::spec::Spec;
use framestride_check::layer_run::LayerRun;
use framestride_check::reference::Reference;
use framestride_check::tensors::Inputs;
use framestride_pictures::{Picture, masks};
use image::Rgb;

use crate::output::{Output, make_folder};
use crate::tensor_files::Frames;
use crate::video;

/// The least length of the longer side of a frame in a picture.
const FRAME_SIDE: usize = 256;

/// At most so many heads get a picture of their attention.
const HEADS: usize = 8;

/// The files of `--report`, in a folder that is made for them.
///
/// * `attention_head_N.png`, with a video: the frames, with the attention of one query of head N
///   over them. The weights are those of the f64 reference under the head's mask. Kernels never
///   have them in memory.
/// * `mask_TYPE.png` for each head type: its mask in model order and in packed order, coloured by
///   what becomes of each tile.
/// * `report.json`: the report of the layer.
pub struct RunPictures {
    attention: Vec<Output>,
    masks: Vec<(HeadType, Output)>,
    json: Output,
}

impl RunPictures {
    /// Makes the folder, and checks every file before the run. None may be one of `inputs`. With a
    /// video, `heads` heads get a picture.
    pub fn new(folder: &Path, heads: Option<usize>, inputs: &[&Path]) -> Result<RunPictures> {
        make_folder(folder)?;
        let output = |name: String| Output::new(&folder.join(name), inputs);
        let attention = 0..heads.map_or(0, |heads| heads.min(HEADS));
        let mask = |head_type: HeadType| Ok((head_type, output(format!("mask_{}.png", head_type.name()))?));
        Ok(RunPictures {
            attention: attention.map(|head| output(format!("attention_head_{head}.png"))).collect::<Result<_>>()?,
            masks: HeadType::ALL.into_iter().map(mask).collect::<Result<_>>()?,
            json: output("report.json".into())?,
        })
    }

    /// All files.
    pub fn outputs(&self) -> impl Iterator<Item = &Output> {
        self.attention.iter().chain(self.masks.iter().map(|(_, output)| output)).chain([&self.json])
    }

    /// Writes all files, and gives their paths.
    pub fn write(&self, spec: &Spec, inputs: &Inputs, run: &LayerRun, frames: Option<&Frames>) -> Result<Vec<PathBuf>> {
        if let Some(frames) = frames {
            let grid = video::grid(spec, frames, "video")?;
            let count = spec.layout.frames.value as usize;
            let query = video::interesting_token(&video::features(frames, count, grid), count);
            let reference = Reference::new(spec, inputs);
            let heads = run.types.iter().zip(&run.report.heads).enumerate();
            for ((head, (&head_type, result)), output) in heads.zip(&self.attention) {
                let first_video = spec.layout.before as usize;
                let weights = reference.head(0, head).probabilities(head_type, first_video + query, inputs.scale());
                let weights = &weights[first_video..][..spec.layout.video_tokens() as usize];
                // Where a bound chose precisions, the title has them.
                let bits = result.precision_error.map_or(String::new(), |_| format!(", {} bits", result.bits));
                let title = format!("head {head}, {}{bits}", head_type.name());
                output.write_picture(&attention_picture(frames, grid, query, weights, &title))?;
            }
        }
        for (head_type, output) in &self.masks {
            output.write_picture(&masks::picture(spec, &[*head_type]))?;
        }
        let mut json = serde_json::to_string_pretty(&run.report).unwrap_or_default();
        json.push('\n');
        self.json.write(json.as_bytes())?;
        let masks = self.masks.iter().map(|(_, output)| output);
        let all = self.attention.iter().chain(masks).chain([&self.json]);
        Ok(all.map(|output| output.path().to_owned()).collect())
    }
}

/// All frames in a grid, darkened, with the weights of one query over them, and above them what the
/// colours mean. A rectangle marks the query's own patch.
fn attention_picture(frames: &Frames, grid: [usize; 2], query: usize, weights: &[f64], title: &str) -> Picture {
    const MARGIN: usize = 16;
    const GAP: usize = 8;
    const LINE: usize = 16;
    /// Where the frames begin: below three lines and a gap.
    const TOP: usize = MARGIN + 3 * LINE + GAP;
    /// The title and the meaning of the colours have room in this width.
    const LEAST_WIDTH: usize = 440;
    let count = weights.len() / (grid[0] * grid[1]);
    let zoom = FRAME_SIDE.div_ceil(frames.width.max(frames.height));
    let (width, height) = (frames.width * zoom, frames.height * zoom);
    let columns = (count as f64).sqrt().ceil() as usize;
    let rows = count.div_ceil(columns);
    let mut picture = Picture::new(
        (2 * MARGIN + columns * (width + GAP) - GAP).max(LEAST_WIDTH) as u32,
        (TOP + MARGIN + rows * (height + GAP + LINE)) as u32,
    );
    let patches = grid[0] * grid[1];
    let (query_frame, query_patch) = (query / patches, query % patches);
    let seen: f64 = weights.iter().sum();
    let strongest = weights.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let (row, column) = (query_patch / grid[1], query_patch % grid[1]);
    let lines = [
        format!("{title}: where patch ({row}, {column}) of frame {query_frame} looks"),
        format!("weight of its attention on video: {:.1}%, on text: {:.1}%", 100.0 * seen, 100.0 * (1.0 - seen).abs()),
    ];
    for (number, text) in lines.iter().enumerate() {
        picture.text(MARGIN as u32, (MARGIN + number * LINE) as u32, text);
    }
    draw_legend(&mut picture, MARGIN as u32, (MARGIN + 2 * LINE) as u32, strongest);
    for frame in 0..count {
        let left = MARGIN + frame % columns * (width + GAP);
        let top = TOP + frame / columns * (height + GAP + LINE);
        let share: f64 = weights[frame * patches..][..patches].iter().sum();
        picture.text(left as u32, top as u32, &format!("frame {frame}: {:.1}%", 100.0 * share));
        for y in 0..height {
            for x in 0..width {
                let (row, column) = (y / zoom, x / zoom);
                let patch = [row * grid[0] / frames.height, column * grid[1] / frames.width];
                let pixel = ((frame * frames.height + row) * frames.width + column) * 3;
                let pixel = [0, 1, 2].map(|channel| frames.pixels[pixel + channel]);
                let weight = weights[frame * patches + patch[0] * grid[1] + patch[1]] / strongest;
                picture.put_pixel((left + x) as u32, (top + LINE + y) as u32, overlay(pixel, weight));
            }
        }
        if frame == query_frame {
            let edge = |patch: usize, side: usize, pixels: usize| (patch * pixels).div_ceil(side);
            let (x0, x1) = (edge(column, grid[1], width), edge(column + 1, grid[1], width));
            let (y0, y1) = (edge(row, grid[0], height), edge(row + 1, grid[0], height));
            let (x, y) = ((left + x0) as u32, (top + LINE + y0) as u32);
            mark_patch(&mut picture, x, y, (x1 - x0) as u32, (y1 - y0) as u32);
        }
    }
    picture
}

/// The rectangle around the query's own patch.
fn mark_patch(picture: &mut Picture, x: u32, y: u32, width: u32, height: u32) {
    for (x, y, width, height) in
        [(x, y, width, 2), (x, y + height - 2, width, 2), (x, y, 2, height), (x + width - 2, y, 2, height)]
    {
        picture.rectangle(x, y, width, height, Rgb([80, 220, 255]));
    }
}

/// What the colours mean: the mark of the query's patch, and the colours of weights up to the
/// largest one.
fn draw_legend(picture: &mut Picture, left: u32, top: u32, strongest: f64) {
    const BOX: u32 = 10;
    const SCALE: u32 = 80;
    mark_patch(picture, left, top + 2, BOX, BOX);
    picture.text(left + BOX + 6, top, "this patch");
    let scale = left + 110;
    for x in 0..SCALE {
        picture.rectangle(scale + x, top + 2, 1, BOX, overlay([160; 3], f64::from(x) / f64::from(SCALE - 1)));
    }
    picture.text(scale + SCALE + 6, top, &format!("weight of a patch, 0 to {:.2}%", 100.0 * strongest));
}

/// The colour of a pixel. It is grey and dark where nothing looks. Where something looks, it is
/// warm and has its own colours. `weight` is relative to the largest one.
fn overlay(pixel: [u8; 3], weight: f64) -> Rgb<u8> {
    // The square root keeps weak weights visible.
    let heat = weight.clamp(0.0, 1.0).sqrt();
    let grey = pixel.iter().map(|&x| f64::from(x)).sum::<f64>() / 3.0;
    let glow = [255.0, 110.0, 20.0];
    Rgb([0, 1, 2].map(|channel| {
        let own = f64::from(pixel[channel]);
        let cold = 0.45 * grey + 8.0;
        let warm = 0.55 * own + 0.45 * glow[channel];
        (cold + (warm - cold) * heat) as u8
    }))
}
