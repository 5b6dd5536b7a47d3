//! Studies: what masks would cost each layer and head of a model.

use std::ffi::c_char;

use framestride_study::{Study, by_head, by_layer, picture};

use crate::argument;
use crate::spec::unknown;
use crate::status::framestride_status::FRAMESTRIDE_INTERNAL;
use crate::status::{Failure, Result, framestride_status, guard};

/// Writes a table of a study to `buffer`, as framestride_spec_toml does.
///
/// A study is `bytes` bytes of JSON, which the command `framestride study` and framestride.study of
/// Python write. `error` is the relative error that a layer may have, above 0 and below 1, or 0 for
/// the study's own. The table has the relative error of each layer at each density, or with `by_head`
/// 1 that of each head under each mask.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_study_table(
    study: *const c_char,
    bytes: usize,
    error: f64,
    by_head: u32,
    buffer: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> framestride_status {
    guard(|| {
        // SAFETY: the pointer is null, or that of so many bytes.
        let study = unsafe { parse(study, bytes, error)? };
        let text = match by_head {
            0 => by_layer(&study),
            1 => self::by_head(&study),
            other => return Err(unknown("by_head", other, "0 (by layer) or 1 (by head)")),
        };
        // SAFETY: the buffer has room for `capacity` bytes, and `needed` is null or that of a variable.
        unsafe { argument::write_text(&text, buffer, capacity, needed) }
    })
}

/// Writes the schedule of a study to `buffer`, as framestride_spec_toml does: JSON of the least
/// density of each layer and step with which the layer is within `error`. Where the study tried 8 bits, it
/// says which layers have them, and which of their heads stay in 16.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_study_schedule(
    study: *const c_char,
    bytes: usize,
    error: f64,
    buffer: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> framestride_status {
    guard(|| {
        // SAFETY: the pointer is null, or that of so many bytes.
        let study = unsafe { parse(study, bytes, error)? };
        // SAFETY: the buffer has room for `capacity` bytes, and `needed` is null or that of a variable.
        unsafe { argument::write_text(&study.schedule().to_json(), buffer, capacity, needed) }
    })
}

/// Draws density against error, and heads by layer, and writes the PNG file to `buffer`, as
/// framestride_plot does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_study_plot(
    study: *const c_char,
    bytes: usize,
    error: f64,
    buffer: *mut u8,
    capacity: usize,
    needed: *mut usize,
) -> framestride_status {
    guard(|| {
        // SAFETY: the pointer is null, or that of so many bytes.
        let study = unsafe { parse(study, bytes, error)? };
        let png = picture(&study).png().map_err(|error| Failure::new(FRAMESTRIDE_INTERNAL, error))?;
        // SAFETY: the buffer has room for `capacity` bytes, and `needed` is null or that of a variable.
        unsafe { argument::write_bytes(&png, buffer, capacity, needed) }
    })
}

/// # Safety
/// The pointer is null, or that of so many bytes.
unsafe fn parse(study: *const c_char, bytes: usize, error: f64) -> Result<Study> {
    // SAFETY: the caller's promise.
    let study = Study::parse("study", unsafe { argument::text_of("study", study, bytes)? })?;
    if error == 0.0 { Ok(study) } else { Ok(study.allowing(error)?) }
}
