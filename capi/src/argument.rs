//! What comes through pointers: structures that begin with their size, texts, and places for results.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use crate::status::{Failure, Result};

/// A structure that begins with its size in bytes, a `u64`. It consists of numbers, pointers and
/// arrays of them, so any bytes are a value.
pub(crate) unsafe trait Structure: Copy {
    const NAME: &str;
    /// Its size in the first version that had it. Whoever adds fields to its end says it.
    const LEAST: usize = size_of::<Self>();
}

/// No structure of any version is larger. A size beyond it was never set.
const MOST_BYTES: u64 = 64 * 1024;

/// Reads a structure of the caller's. What an older one does not have is zero. A newer one is accepted
/// if what this version does not know is zero.
///
/// # Safety
/// Where the pointer is not null, as many bytes are there as its size says.
pub(crate) unsafe fn read_sized<T: Structure>(pointer: *const T) -> Result<T> {
    // SAFETY: the caller's promise.
    let size = unsafe { checked_size(pointer)? };
    let known = size.min(size_of::<T>());
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: so many bytes are there, and any bytes are a value. The pointer need not be aligned.
    let (value, tail) = unsafe {
        value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(pointer.cast(), known);
        (value.assume_init(), std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known))
    };
    match tail.iter().position(|&byte| byte != 0) {
        None => Ok(value),
        Some(at) => Err(Failure::argument(
            T::NAME,
            format!("{size} bytes, of which byte {} is not zero", known + at),
            format!("zeros behind the {known} bytes that this version of the library knows"),
            "Leave newer fields at zero, or use a newer library",
        )),
    }
}

/// Fills a structure of the caller's, whose size is set. What an older one does not have is left out,
/// and what a newer one has behind it is set to zero.
///
/// # Safety
/// As for [`read_sized`], and the bytes can be written.
pub(crate) unsafe fn write_sized<T: Structure>(pointer: *mut T, value: T) -> Result {
    // SAFETY: the caller's promise.
    let size = unsafe { checked_size(pointer)? };
    let bytes = pointer.cast::<u8>();
    // SAFETY: so many bytes are there. The size, which comes first, stays the caller's.
    unsafe {
        bytes.write_bytes(0, size);
        bytes.copy_from_nonoverlapping((&raw const value).cast(), size.min(size_of::<T>()));
        bytes.cast::<u64>().write_unaligned(size as u64);
    }
    Ok(())
}

/// # Safety
/// Where the pointer is not null, a `u64` is there.
unsafe fn checked_size<T: Structure>(pointer: *const T) -> Result<usize> {
    // SAFETY: the caller's promise.
    let size = (!pointer.is_null()).then(|| unsafe { pointer.cast::<u64>().read_unaligned() });
    let found = match size {
        None => "NULL".into(),
        Some(size) if (T::LEAST as u64..=MOST_BYTES).contains(&size) => return Ok(size as usize),
        Some(size) => format!("a size of {size} bytes"),
    };
    let allowed = format!("a structure whose first field is its size, {} bytes in this version", size_of::<T>());
    Err(Failure::argument(T::NAME, found, allowed, "Set all of it to zero, then its size to sizeof"))
}

/// Checks fields that must be 0, so that a later version can give them a meaning.
pub(crate) fn check_reserved(reserved: &[u32]) -> Result {
    match reserved.iter().find(|&&value| value != 0) {
        None => Ok(()),
        Some(value) => {
            let mend = "Set all of the structure to zero first";
            Err(Failure::argument("reserved", value, "0", mend))
        }
    }
}

/// Writes a result of a function.
///
/// # Safety
/// Where the pointer is not null, a `T` can be written there.
pub(crate) unsafe fn write<T>(name: &str, pointer: *mut T, value: impl FnOnce() -> Result<T>) -> Result {
    if pointer.is_null() {
        return Err(null(name));
    }
    let value = value()?;
    // SAFETY: the caller's promise, and it is not null.
    unsafe { pointer.write_unaligned(value) };
    Ok(())
}

/// Writes a text and a zero byte to a buffer that has room for both, and their bytes to `needed`.
///
/// # Safety
/// The buffer has room for `capacity` bytes. Where `needed` is not null, a number can be written there.
pub(crate) unsafe fn write_text(text: &str, buffer: *mut c_char, capacity: usize, needed: *mut usize) -> Result {
    let bytes = [text.as_bytes(), &[0]].concat();
    // SAFETY: the caller's promise.
    unsafe { write_bytes(&bytes, buffer.cast(), capacity, needed) }
}

/// Writes bytes to a buffer that has room for them, and how many they are.
///
/// # Safety
/// The buffer has room for `capacity` bytes, and `needed` is null or that of a variable.
pub(crate) unsafe fn write_bytes(bytes: &[u8], buffer: *mut u8, capacity: usize, needed: *mut usize) -> Result {
    if buffer.is_null() && capacity > 0 {
        return Err(Failure::argument("buffer", "NULL", "a buffer, or a capacity of 0", "Pass its address"));
    }
    // SAFETY: the caller's promise.
    unsafe { write("needed", needed, || Ok(bytes.len()))? };
    if capacity >= bytes.len() {
        // SAFETY: the buffer has room for so many bytes, and is not null.
        unsafe { buffer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
    Ok(())
}

/// A text that ends with a zero byte.
///
/// # Safety
/// Where the pointer is not null, such a text is there, and stays while the result is used.
pub(crate) unsafe fn text<'a>(name: &str, pointer: *const c_char) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(null(name));
    }
    // SAFETY: the caller's promise, and it is not null.
    utf8(name, unsafe { CStr::from_ptr(pointer) }.to_bytes())
}

/// A text of so many bytes.
///
/// # Safety
/// Where the pointer is not null, they are there, and stay while the result is used.
pub(crate) unsafe fn text_of<'a>(name: &str, pointer: *const c_char, bytes: usize) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(null(name));
    }
    if bytes > isize::MAX as usize {
        return Err(Failure::argument(name, format!("{bytes} bytes"), "the size of a text", "Pass its size in bytes"));
    }
    // SAFETY: the caller's promise, and it is not null.
    utf8(name, unsafe { std::slice::from_raw_parts(pointer.cast(), bytes) })
}

fn utf8<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let found = format!("bytes that are no UTF-8 ({error})");
        Failure::argument(name, found, "a text in UTF-8", "Encode it in UTF-8")
    })
}

fn null(name: &str) -> Failure {
    Failure::argument(name, "NULL", "a pointer", "Pass the address of a variable")
}

/// A short text as a field of fixed size, which ends with a zero byte. What does not fit is cut off.
pub(crate) fn field<const N: usize>(text: &str) -> [c_char; N] {
    let end = (0..N.min(text.len() + 1)).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let mut field = [0; N];
    field.iter_mut().zip(&text.as_bytes()[..end]).for_each(|(to, &from)| *to = from as c_char);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A structure that had only two fields at first.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Grown {
        size: u64,
        first: u64,
        later: u64,
    }

    // SAFETY: it begins with its size, and consists of numbers.
    unsafe impl Structure for Grown {
        const NAME: &str = "grown";
        const LEAST: usize = 16;
    }

    #[test]
    fn structures_of_other_versions() {
        let read = |words: &[u64]| {
            // SAFETY: as many bytes are there as the first word says.
            unsafe { read_sized(words.as_ptr().cast::<Grown>()) }.map_err(|failure| failure.message)
        };
        assert_eq!(read(&[16, 5, 9]), Ok(Grown { size: 16, first: 5, later: 0 }), "what is behind it is not its own");
        assert_eq!(read(&[24, 5, 9]), Ok(Grown { size: 24, first: 5, later: 9 }));
        assert_eq!(read(&[32, 5, 9, 0]), Ok(Grown { size: 32, first: 5, later: 9 }));
        let newer = read(&[32, 5, 9, 1 << 8]).unwrap_err();
        assert!(newer.contains("byte 25 is not zero"), "{newer}");
        let small = read(&[8, 5, 9]).unwrap_err();
        assert!(small.contains("24 bytes in this version"), "{small}");

        let written = |size: u64| {
            let mut words = [size, 1, 1, 1, 1];
            let value = Grown { size: 0, first: 5, later: 9 };
            // SAFETY: as many bytes are there as the first word says.
            let result = unsafe { write_sized(words.as_mut_ptr().cast(), value) };
            result.map(|()| words).map_err(|failure| failure.message)
        };
        assert_eq!(written(16), Ok([16, 5, 1, 1, 1]));
        assert_eq!(written(24), Ok([24, 5, 9, 1, 1]));
        assert_eq!(written(32), Ok([32, 5, 9, 0, 1]));
        assert!(written(8).is_err());
    }

    #[test]
    fn fields_end_with_a_zero() {
        let text = |field: [c_char; 4]| field.map(|c| c as u8);
        assert_eq!(text(field("ab")), *b"ab\0\0");
        assert_eq!(text(field("abcd")), *b"abc\0");
        assert_eq!(text(field("ab\u{e4}")), *b"ab\0\0", "a character is not cut");
    }
}
