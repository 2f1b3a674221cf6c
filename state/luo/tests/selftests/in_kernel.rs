//! The tests that the kernel has within itself: three shared objects, and blocks of random orders.

use std::sync::Arc;

use abi::Memory;
use abi::MemoryMut;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::record::checksum;
use abi::vmalloc::Descriptor;
use abi::vmalloc::List;
use kho::Kho;
use pages::Order;
use pages::PageRange;
use pages::Pfn;
use tideover_luo::Compatible;
use tideover_luo::HandlerError;
use tideover_luo::Handlers;
use tideover_luo::Object;
use tideover_luo::ShareError;
use tideover_luo::SharedObject;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use crate::lives::GUEST;
use crate::lives::Life;
use crate::lives::lives;
use crate::memfd::KIND;
use crate::memfd::MemfdHandler;

const MAGIC: u64 = 0xFEED_F00D_CAFE_BEE0;

/// An object that is nothing but a number that has to arrive.
struct TestFlb(u64);

impl SharedObject for TestFlb {
    fn compatible(&self) -> Compatible {
        Compatible::new(format!("liveupdate-test-flb-v{}", self.0).as_bytes()).unwrap()
    }

    fn preserve(&self, _: &mut Kho) -> Result<(Object, u64), HandlerError> {
        Ok((Arc::new(self.0), MAGIC + self.0))
    }

    fn unpreserve(&self, _: &mut Kho, object: &Object, data: u64) {
        assert_eq!((object.downcast_ref(), data), (Some(&self.0), MAGIC + self.0));
    }

    fn retrieve(&self, _: &mut Kho, data: u64) -> Result<Object, HandlerError> {
        assert_eq!(data, MAGIC + self.0, "what preserve gave");
        Ok(Arc::new(data))
    }

    fn finish(&self, _: &mut Kho, object: Option<&Object>, data: u64) {
        assert_eq!(object.expect("retrieved").downcast_ref(), Some(&data), "what retrieve gave");
    }
}

/// The three objects.
pub(crate) fn objects() -> [Arc<dyn SharedObject>; 3] {
    [0, 1, 2].map(|number| -> Arc<dyn SharedObject> { Arc::new(TestFlb(number)) })
}

/// LIVEUPDATE_TEST: three objects on every kind of file. H3.8.1, H3.8.4, H3.8.5.
#[test]
fn three_shared_objects_arrive_with_their_numbers_and_are_finished_once() {
    let first: fn(&mut Life) = |life| {
        let object = objects()[0].compatible();
        assert!(life.luo.retrieve_shared(&mut life.kho, &object).is_err(), "a cold boot has no data");
        life.create("one");
        life.create("other");
        life.preserve("one", 1, "text");
        life.preserve("other", 1, "text");
        assert!(life.luo.hold_shared(&object).is_ok());
    };
    let second: fn(&mut Life) = |life| {
        let [a, b, _] = objects().map(|object| object.compatible());
        for (name, number) in [(a, MAGIC), (b, MAGIC + 1)] {
            let object = life.luo.retrieve_shared(&mut life.kho, &name).unwrap();
            assert_eq!(object.downcast_ref(), Some(&number));
        }
        life.finish("one");
        assert!(life.luo.retrieve_shared(&mut life.kho, &a).is_ok(), "one file still needs it");
        life.finish("other");
        assert!(life.luo.retrieve_shared(&mut life.kho, &a).is_err(), "finished");
    };
    let third: fn(&mut Life) = |life| assert_eq!(life.luo.compatibles(), []);
    lives(
        "in_kernel::three_shared_objects_arrive_with_their_numbers_and_are_finished_once",
        &[first, second, third],
    );
}

/// LIVEUPDATE_TEST: to register the first one again is refused. H3.8.7.
#[test]
fn the_first_of_three_objects_is_not_registered_again() {
    let mut handlers = Handlers::default();
    handlers.register(MemfdHandler).unwrap();
    let objects = objects();
    objects.iter().for_each(|object| handlers.register_shared(&KIND, object).unwrap());
    let refused = handlers.register_shared(&KIND, &objects[0]);
    assert_eq!(refused.map_err(|error| error.errno()), Err(tideover_luo::Errno::EEXIST));
    let same_name: Arc<dyn SharedObject> = Arc::new(TestFlb(0));
    let refused = handlers.register_shared(&KIND, &same_name);
    assert!(matches!(refused, Err(ShareError::Exists { .. })), "{refused:?}");
}

const KHO_TEST: SubtreeName = SubtreeName::literal("kho_test");

/// Blocks of orders that look random, apart from each other, 8 MiB of them in all; each filled with bytes of its own.
fn blocks(life: &mut Life) -> (Vec<u64>, Vec<u8>) {
    let (mut found, mut bytes, mut random, mut next) = (Vec::new(), Vec::new(), 1u64, GUEST >> 12);
    while bytes.len() < 8 << 20 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let order = Order::new(u32::try_from((random >> 33) % 8).unwrap()).unwrap();
        // Each begins two of its own size behind the one before, at least: no two are one block.
        let start = (next + order.len_pages()).next_multiple_of(2 * order.len_pages());
        let block = PageRange::block(Pfn::new(start).unwrap(), order).unwrap();
        let content = vec![u8::try_from(random >> 56).unwrap(); usize::try_from(block.len_bytes()).unwrap()];
        life.arena.write(block.start().address(), &content).unwrap();
        life.kho.preserve(block).unwrap();
        bytes.extend(content);
        found.push(block.start().address() | u64::from(order.get()));
        next = block.end();
    }
    (found, bytes)
}

/// The KHO test module: blocks of random orders, their checksum, and a list of them in scattered pages.
#[test]
fn blocks_of_random_orders_arrive_with_their_orders_and_their_bytes() {
    let first: fn(&mut Life) = |life| {
        let (found, bytes) = blocks(life);
        let list = life.kho.store_list(found.as_slice().as_bytes()).unwrap();
        let blob = [list.as_bytes(), &(found.len() as u64).to_le_bytes(), &checksum(&[&bytes]).to_le_bytes()];
        let blob = blob.concat();
        let data = life.kho.store(&blob).unwrap().start().address();
        life.kho.set_subtree(Subtree { name: KHO_TEST, data, size: blob.len() as u64 });
    };
    let second: fn(&mut Life) = |life| {
        let Subtree { data, size, .. } = *life.kho.subtree(&KHO_TEST).unwrap();
        let mut blob = vec![0; usize::try_from(size).unwrap()];
        life.kho.memory().read(data, &mut blob).unwrap();
        let (list, rest) = Descriptor::read_from_prefix(&blob).unwrap();
        let (count, sum) = rest.split_at(8);
        let count = u64::from_le_bytes(count.try_into().unwrap());
        let list = List::read(&life.kho.memory(), &list).unwrap();
        let words = list.read_bytes(&life.kho.memory(), 8 * count).unwrap();
        let mut bytes = Vec::new();
        for word in words.as_chunks::<8>().0 {
            let word = u64::from_le_bytes(*word);
            let order = Order::new(u32::try_from(word & 0xfff).unwrap()).unwrap();
            let block = PageRange::block(Pfn::new(word >> 12).unwrap(), order).unwrap();
            assert!(life.kho.is_preserved(block), "{block:?} with its order");
            let mut content = vec![0; usize::try_from(block.len_bytes()).unwrap()];
            life.arena.read(block.start().address(), &mut content).unwrap();
            bytes.extend(content);
            // A second restore of the same block fails.
            life.kho.unpreserve(block).unwrap();
            life.kho.unpreserve(block).unwrap_err();
        }
        assert_eq!(checksum(&[&bytes]).to_le_bytes(), sum, "of {} bytes", bytes.len());
        assert!(count > 20 && bytes.len() >= 8 << 20, "{count} blocks");
    };
    lives("in_kernel::blocks_of_random_orders_arrive_with_their_orders_and_their_bytes", &[first, second]);
}
