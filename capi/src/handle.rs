//! What comes from the caller: handles, and structures that begin with their size.
//!
//! A handle is the key of a table, with a generation. So one that was freed, or that nobody gave, is
//! found out and never followed.

use std::ffi::{CStr, c_char};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use framestride::{Device, Module, SparseAttention, Spec};
use slotmap::{DefaultKey, Key, KeyData, SlotMap};

use crate::status::framestride_status::FRAMESTRIDE_INVALID_HANDLE;
use crate::status::{Failure, Result};

/// What a handle stands for.
pub(crate) enum Entry {
    Device(Device),
    Spec(Arc<Spec>),
    Module(Arc<Module>),
    Attention(Arc<SparseAttention>),
}

/// Everything that has a handle. A lock whose holder panicked still guards a whole table, so its
/// poison is ignored.
static TABLE: LazyLock<RwLock<SlotMap<DefaultKey, Entry>>> = LazyLock::new(RwLock::default);

/// A kind of thing that has a handle.
pub(crate) trait Kind: Clone {
    const NAME: &str;
    fn of(entry: &Entry) -> Option<&Self>;
    fn into_entry(self) -> Entry;
}

macro_rules! kinds {
    ($($variant:ident($kind:ty), $name:literal;)*) => {
        impl Entry {
            fn kind(&self) -> &'static str {
                match self { $(Entry::$variant(_) => $name,)* }
            }
        }
        $(impl Kind for $kind {
            const NAME: &str = $name;
            fn of(entry: &Entry) -> Option<&Self> {
                match entry { Entry::$variant(value) => Some(value), _ => None }
            }
            fn into_entry(self) -> Entry {
                Entry::$variant(self)
            }
        })*
    };
}

kinds! {
    Device(Device), "device";
    Spec(Arc<Spec>), "spec";
    Module(Arc<Module>), "module";
    Attention(Arc<SparseAttention>), "attention";
}

/// Gives a value a handle, which is never 0.
pub(crate) fn insert(value: impl Kind) -> u64 {
    let entry = value.into_entry();
    TABLE.write().unwrap_or_else(PoisonError::into_inner).insert(entry).data().as_ffi()
}

/// What a handle stands for.
pub(crate) fn get<T: Kind>(handle: u64) -> Result<T> {
    let table = TABLE.read().unwrap_or_else(PoisonError::into_inner);
    let entry = key(handle).and_then(|key| table.get(key));
    entry.and_then(T::of).cloned().ok_or_else(|| invalid::<T>(handle, entry))
}

/// Frees a handle. That of 0 may be freed, as NULL may.
pub(crate) fn remove<T: Kind>(handle: u64) -> Result {
    if handle == 0 {
        return Ok(());
    }
    let mut table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
    let key = key(handle);
    let entry = key.and_then(|key| table.get(key));
    if entry.and_then(T::of).is_none() {
        return Err(invalid::<T>(handle, entry));
    }
    let removed = key.and_then(|key| table.remove(key));
    // What the entry holds may take a while to free.
    drop(table);
    drop(removed);
    Ok(())
}

/// The key of a handle that the table may have given.
fn key(handle: u64) -> Option<DefaultKey> {
    let data = KeyData::from_ffi(handle);
    // A number that was made up need not be one.
    (data.as_ffi() == handle).then(|| data.into())
}

fn invalid<T: Kind>(handle: u64, entry: Option<&Entry>) -> Failure {
    let name = T::NAME;
    let found = match entry {
        Some(entry) => format!("a handle of kind {}", entry.kind()),
        None if handle == 0 => "a handle of 0".into(),
        None => format!("the handle {handle:#x}, which was freed or never given"),
    };
    let message = Failure::argument(
        name,
        found,
        format!("a handle of kind {name} that this library gave and nobody has freed"),
        "Use the handle until it is freed, and not after",
    );
    Failure { status: FRAMESTRIDE_INVALID_HANDLE, ..message }
}

/// A structure that begins with its size in bytes, a `u64`. It consists of numbers, pointers and
/// arrays of them, so any bytes are a value.
pub(crate) unsafe trait Sized64: Copy {
    const NAME: &str;
}

/// No structure of any version is larger. A size beyond it was never set.
const MOST_BYTES: u64 = 64 * 1024;

/// Reads a structure of the caller's. One of a later version is accepted if what this version does
/// not know is zero.
///
/// # Safety
/// Where the pointer is not null, as many bytes are there as its size says.
pub(crate) unsafe fn read_sized<T: Sized64>(pointer: *const T) -> Result<T> {
    // SAFETY: the caller's promise.
    let size = unsafe { checked_size(pointer)? };
    // SAFETY: the size covers all of `T` (checked above). The pointer may be misaligned by mistake.
    let (value, tail) = unsafe {
        let end = pointer.cast::<u8>().add(size_of::<T>());
        (pointer.read_unaligned(), std::slice::from_raw_parts(end, size - size_of::<T>()))
    };
    match tail.iter().position(|&byte| byte != 0) {
        None => Ok(value),
        Some(at) => Err(Failure::argument(
            T::NAME,
            format!("{size} bytes, of which byte {} is not zero", size_of::<T>() + at),
            format!("zeros behind the {} bytes that this version of the library knows", size_of::<T>()),
            "Leave newer fields at zero, or use a newer library",
        )),
    }
}

/// Fills a structure of the caller's, whose size is set. What a later version has behind it is set to
/// zero.
///
/// # Safety
/// As for [`read_sized`], and the bytes can be written.
pub(crate) unsafe fn write_sized<T: Sized64>(pointer: *mut T, value: T) -> Result {
    // SAFETY: the caller's promise.
    let size = unsafe { checked_size(pointer)? };
    // SAFETY: the size covers all of `T` (checked above). The first field of the caller's stays.
    unsafe {
        pointer.cast::<u8>().write_bytes(0, size);
        pointer.write_unaligned(value);
        pointer.cast::<u64>().write_unaligned(size as u64);
    }
    Ok(())
}

/// # Safety
/// Where the pointer is not null, a `u64` is there.
unsafe fn checked_size<T: Sized64>(pointer: *const T) -> Result<usize> {
    let least = size_of::<T>() as u64;
    // SAFETY: the caller's promise.
    let size = (!pointer.is_null()).then(|| unsafe { pointer.cast::<u64>().read_unaligned() });
    let found = match size {
        None => "NULL".into(),
        Some(size) if (least..=MOST_BYTES).contains(&size) => return Ok(size as usize),
        Some(size) => format!("a size of {size} bytes"),
    };
    let allowed = format!("a structure whose first field is its size, {least} bytes in this version");
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
    if buffer.is_null() && capacity > 0 {
        return Err(Failure::argument("buffer", "NULL", "a buffer, or a capacity of 0", "Pass its address"));
    }
    // SAFETY: the caller's promise.
    unsafe { write("needed", needed, || Ok(text.len() + 1))? };
    if capacity > text.len() {
        // SAFETY: the buffer has room for so many bytes, and is not null.
        unsafe {
            buffer.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len());
            buffer.add(text.len()).write(0);
        }
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
