//! A memfd, as a value, and its handler: records are the kernel's `memfd-v2`, its pages frames of region 0.

use std::sync::Arc;
use std::sync::Mutex;

use abi::Memory;
use abi::folio;
use abi::folio::Folio;
use abi::memfd;
use abi::memfd::flags;
use abi::vmalloc::Descriptor;
use kho::Kho;
use pages::Order;
use pages::PAGE_BYTES;
use pages::PageRange;
use tideover_luo::Compatible;
use tideover_luo::Context;
use tideover_luo::Errno;
use tideover_luo::File;
use tideover_luo::FileId;
use tideover_luo::Handler;
use tideover_luo::HandlerError;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

/// The kind.
pub(crate) const KIND: Compatible = Compatible::literal(memfd::COMPATIBLE);

/// A memfd: its size, its pages (`None` for a hole), its position.
#[derive(Debug)]
pub(crate) struct Memfd {
    id: FileId,
    size: usize,
    pages: Vec<Option<Vec<u8>>>,
    pos: Mutex<u64>,
}

impl Memfd {
    /// One of `size` bytes with these pages; the others are holes.
    pub(crate) fn sparse(size: usize, pages: &[(usize, &str)]) -> File {
        let mut all = vec![None; size.div_ceil(PAGE_BYTES)];
        for (index, text) in pages {
            let mut page = text.as_bytes().to_vec();
            page.resize(PAGE_BYTES, 0);
            all[*index] = Some(page);
        }
        Arc::new(Self { id: FileId::fresh(), size, pages: all, pos: Mutex::new(0) })
    }

    /// One page with a text in it.
    pub(crate) fn with(text: &str) -> File {
        Self::sparse(PAGE_BYTES, &[(0, text)])
    }

    /// One of no bytes.
    pub(crate) fn empty() -> File {
        Self::sparse(0, &[])
    }

    pub(crate) fn of(file: &File) -> &Self {
        file.downcast_ref().expect("a memfd")
    }

    /// Reads up to `len` bytes from its position on, as read(2) does.
    pub(crate) fn read(&self, len: usize) -> Vec<u8> {
        let mut pos = self.pos.lock().unwrap();
        let start = usize::try_from(*pos).unwrap().min(self.size);
        let bytes: Vec<u8> = (start..self.size.min(start + len)).map(|at| self.byte(at)).collect();
        *pos += bytes.len() as u64;
        bytes
    }

    fn byte(&self, at: usize) -> u8 {
        self.pages[at / PAGE_BYTES].as_ref().map_or(0, |page| page[at % PAGE_BYTES])
    }

    /// The text in its first page.
    pub(crate) fn text(&self) -> String {
        let page = self.pages.first().cloned().flatten().unwrap_or_default();
        String::from_utf8(page.into_iter().take_while(|byte| *byte != 0).collect()).unwrap()
    }

    /// Indices of the pages that are there.
    pub(crate) fn present(&self) -> Vec<usize> {
        (0..self.pages.len()).filter(|index| self.pages[*index].is_some()).collect()
    }
}

fn refuse<E: std::error::Error + Send + Sync + 'static>(errno: Errno) -> impl Fn(E) -> HandlerError {
    move |why| HandlerError::new(errno, why)
}

fn page(address: u64) -> PageRange {
    PageRange::of_bytes(address, 4096).unwrap()
}

/// Preserves [`Memfd`]s.
pub(crate) struct MemfdHandler;

impl MemfdHandler {
    fn store(kho: &mut Kho, memfd: &Memfd, taken: &mut Vec<PageRange>) -> Result<u64, HandlerError> {
        let no_room = refuse(Errno::ENOMEM);
        let mut folios = Vec::new();
        for (index, bytes) in (0..).zip(&memfd.pages) {
            let Some(bytes) = bytes else { continue };
            let frames = kho.store(bytes).map_err(&no_room)?;
            taken.push(frames);
            folios.push(Folio { index, frames, flags: flags::DIRTY | flags::UPTODATE });
        }
        let list = kho.store_list(&folio::encode(&folios)).map_err(&no_room)?;
        let pos = *memfd.pos.lock().unwrap();
        let record = memfd::Memfd { pos, size_bytes: memfd.size as u64, seals: 0, folios };
        let stored = kho.store(record.ser(list).as_bytes());
        if stored.is_err() {
            kho.free_list(&list).unwrap();
        }
        Ok(stored.map_err(&no_room)?.start().address())
    }

    fn record(kho: &Kho, data: u64) -> (memfd::Memfd, Descriptor) {
        let order = |_| Some(Order::PAGE);
        let record = memfd::Memfd::read(&kho.memory(), data, &order).unwrap();
        let mut bytes = [0; size_of::<memfd::MemfdSer>()];
        kho.memory().read(data, &mut bytes).unwrap();
        (record, memfd::MemfdSer::read_from_bytes(&bytes).unwrap().folios)
    }

    fn free(kho: &mut Kho, data: u64) {
        let (record, list) = Self::record(kho, data);
        record.folios.iter().for_each(|folio| kho.free(folio.frames));
        kho.free_list(&list).unwrap();
        kho.free(page(data));
    }
}

impl Handler for MemfdHandler {
    fn compatible(&self) -> Compatible {
        KIND
    }

    fn can_preserve(&self, file: &File) -> bool {
        file.is::<Memfd>()
    }

    fn id(&self, file: &File) -> FileId {
        Memfd::of(file).id
    }

    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError> {
        let mut taken = Vec::new();
        Self::store(context.kho, Memfd::of(file), &mut taken)
            .inspect_err(|_| taken.into_iter().for_each(|frames| context.kho.free(frames)))
    }

    fn unpreserve(&self, context: &mut Context<'_>, _: &File, data: u64) {
        Self::free(context.kho, data);
    }

    /// Only the position can be another one by now.
    fn freeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> Result<u64, HandlerError> {
        let (mut record, list) = Self::record(context.kho, data);
        record.pos = *Memfd::of(file).pos.lock().unwrap();
        let stored = context.kho.store(record.ser(list).as_bytes()).map_err(refuse(Errno::ENOMEM))?;
        context.kho.free(page(data));
        Ok(stored.start().address())
    }

    fn unfreeze(&self, _: &mut Context<'_>, _: &File, data: u64) -> u64 {
        data
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        let (record, _) = Self::record(context.kho, data);
        let size = usize::try_from(record.size_bytes).unwrap();
        let mut pages = vec![None; size.div_ceil(PAGE_BYTES)];
        for folio in record.folios {
            let mut bytes = vec![0; PAGE_BYTES];
            let read = context.kho.memory().read(folio.frames.start().address(), &mut bytes);
            read.map_err(refuse(Errno::EIO))?;
            pages[usize::try_from(folio.index).unwrap()] = Some(bytes);
        }
        Ok(Arc::new(Memfd { id: FileId::fresh(), size, pages, pos: Mutex::new(record.pos) }))
    }

    fn can_finish(&self, _: Option<&File>) -> bool {
        true
    }

    fn finish(&self, context: &mut Context<'_>, _: Option<&File>, data: u64) {
        Self::free(context.kho, data);
    }
}
