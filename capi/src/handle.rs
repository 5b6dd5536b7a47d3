//! The table of handles. A handle is a key with a generation. So one that was freed, or that nobody
//! gave, is found out and never followed.

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
