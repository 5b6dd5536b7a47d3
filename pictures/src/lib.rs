//! Pictures of masks, and what pictures are drawn with.

pub mod masks;

use std::convert::Infallible;
use std::io::Cursor;

use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::ascii::FONT_7X13;
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{Line, PrimitiveStyle};
use embedded_graphics::text::{Baseline, Text};
use image::{ImageFormat, ImageResult, Rgb, RgbImage};

const BACKGROUND: Rgb<u8> = Rgb([250, 250, 248]);
const INK: Rgb<u8> = Rgb([30, 34, 40]);

/// A picture to draw and write on.
pub struct Picture(RgbImage);

impl OriginDimensions for Picture {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Picture {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(point, colour) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(point.x), u32::try_from(point.y))
                && x < self.0.width()
                && y < self.0.height()
            {
                self.0.put_pixel(x, y, Rgb([colour.r(), colour.g(), colour.b()]));
            }
        }
        Ok(())
    }
}

impl Picture {
    /// An empty picture.
    pub fn new(width: u32, height: u32) -> Picture {
        Picture(RgbImage::from_pixel(width, height, BACKGROUND))
    }

    /// Writes text with its upper left corner at a point.
    pub fn text(&mut self, x: u32, y: u32, text: &str) {
        let ink = Rgb888::new(INK.0[0], INK.0[1], INK.0[2]);
        let style = MonoTextStyle::new(&FONT_7X13, ink);
        let Ok(_) = Text::with_baseline(text, Point::new(x as i32, y as i32), style, Baseline::Top).draw(self);
    }

    /// Colours one pixel.
    pub fn put_pixel(&mut self, x: u32, y: u32, colour: Rgb<u8>) {
        self.0.put_pixel(x, y, colour);
    }

    /// Fills a rectangle, as far as it lies in the picture.
    pub fn rectangle(&mut self, x: u32, y: u32, width: u32, height: u32, colour: Rgb<u8>) {
        for y in y..(y + height).min(self.0.height()) {
            for x in x..(x + width).min(self.0.width()) {
                self.0.put_pixel(x, y, colour);
            }
        }
    }

    /// Draws a line of one pixel, as far as it lies in the picture.
    pub fn line(&mut self, from: [i32; 2], to: [i32; 2], colour: Rgb<u8>) {
        let [from, to] = [from, to].map(|[x, y]| Point::new(x, y));
        let style = PrimitiveStyle::with_stroke(Rgb888::new(colour.0[0], colour.0[1], colour.0[2]), 1);
        let Ok(()) = Line::new(from, to).into_styled(style).draw(self);
    }

    /// The picture as a PNG file.
    ///
    /// # Errors
    /// What the encoder says, which has no reason to say anything.
    pub fn png(&self) -> ImageResult<Vec<u8>> {
        let mut file = Cursor::new(Vec::new());
        self.0.write_to(&mut file, ImageFormat::Png)?;
        Ok(file.into_inner())
    }
}
