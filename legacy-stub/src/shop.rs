//! The shop's data: made from a seed, changed by writes, bounded.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// How many of each there are at the start.
const SEEDED: u64 = 200;
/// How many orders a shop takes before it forgets the oldest.
const MOST: usize = 100_000;

/// The data.
#[derive(Debug)]
pub struct Shop {
    seed: u64,
    /// Orders that were made or changed; nothing for one that was deleted.
    orders: BTreeMap<u64, Option<Value>>,
    next: u64,
}

const FIRST: [&str; 8] = ["Ada", "Alan", "Barbara", "Edsger", "Grace", "Ken", "Leslie", "Radia"];
const LAST: [&str; 8] = ["Archer", "Baker", "Carter", "Dyer", "Fisher", "Mason", "Potter", "Weaver"];
const THINGS: [&str; 8] = ["teapot", "lamp", "chair", "kettle", "clock", "mirror", "basket", "ladder"];
const KINDS: [&str; 8] = ["copper", "oak", "glass", "linen", "iron", "paper", "clay", "wool"];

impl Shop {
    /// A shop whose data is made from a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, orders: BTreeMap::new(), next: SEEDED + 1 }
    }

    /// A number that belongs to a thing: the same run to run.
    fn number(&self, kind: u64, id: u64) -> u64 {
        let mut z = self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(kind << 32).wrapping_add(id);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn pick<'a>(&self, kind: u64, id: u64, from: &[&'a str; 8]) -> &'a str {
        from[usize::try_from(self.number(kind, id) % 8).unwrap_or(0)]
    }

    /// A user.
    pub fn user(&self, id: u64) -> Option<Value> {
        let name = format!("{} {}", self.pick(1, id, &FIRST), self.pick(2, id, &LAST));
        let email = format!("{}.{id}@example.com", name.to_lowercase().replace(' ', "."));
        (1..=SEEDED).contains(&id).then(|| json!({"id": id, "name": name, "email": email}))
    }

    /// A product.
    pub fn product(&self, id: u64) -> Option<Value> {
        let name = format!("{} {}", self.pick(3, id, &KINDS), self.pick(4, id, &THINGS));
        let cents = 500 + self.number(5, id) % 20_000;
        (1..=SEEDED)
            .contains(&id)
            .then(|| json!({"id": id, "name": name, "price_cents": cents, "stock": self.number(6, id) % 100}))
    }

    /// An order.
    pub fn order(&self, id: u64) -> Option<Value> {
        if let Some(order) = self.orders.get(&id) {
            return order.clone();
        }
        let product = 1 + self.number(7, id) % SEEDED;
        let quantity = 1 + self.number(8, id) % 5;
        let price = self.product(product)?["price_cents"].as_u64()?;
        (1..=SEEDED).contains(&id).then(|| {
            json!({
                "id": id, "user": 1 + self.number(9, id) % SEEDED, "status": "shipped",
                "items": [{"product": product, "quantity": quantity, "price_cents": price}],
                "total_cents": price * quantity,
            })
        })
    }

    /// Takes an order for a product.
    pub fn place(&mut self, product: u64, quantity: u64) -> Value {
        let id = self.next;
        self.next += 1;
        let price = self.product(product).and_then(|product| product["price_cents"].as_u64()).unwrap_or(0);
        let order = json!({
            "id": id, "user": 1, "status": "placed",
            "items": [{"product": product, "quantity": quantity, "price_cents": price}],
            "total_cents": price.saturating_mul(quantity),
        });
        self.orders.insert(id, Some(order.clone()));
        while self.orders.len() > MOST {
            self.orders.pop_first();
        }
        order
    }

    /// Changes an order's status, or deletes the order.
    pub fn change(&mut self, id: u64, status: Option<&str>) -> Option<Value> {
        let mut order = self.order(id)?;
        if let Some(status) = status {
            order["status"] = status.into();
        }
        self.orders.insert(id, status.map(|_| order.clone()));
        Some(order)
    }

    /// A payment.
    pub fn payment(&self, id: u64) -> Option<Value> {
        let order = self.order(id)?;
        Some(json!({"id": id, "order": id, "amount_cents": order["total_cents"], "state": "captured"}))
    }

    /// A notification.
    pub fn notification(&self, id: u64) -> Value {
        json!({"id": id, "text": format!("Your {} has been sent", self.pick(10, id, &THINGS))})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_shop() {
        let (a, b, other) = (Shop::new(1), Shop::new(1), Shop::new(2));
        let all = |shop: &Shop| {
            (1..=SEEDED)
                .map(|id| [shop.user(id), shop.product(id), shop.order(id), shop.payment(id)])
                .collect::<Vec<_>>()
        };
        assert_eq!(all(&a), all(&b));
        assert_ne!(all(&a), all(&other));
        assert_eq!((a.user(0), a.order(SEEDED + 1)), (None, None));
    }

    #[test]
    fn orders_are_placed_changed_and_deleted() {
        let mut shop = Shop::new(1);
        let placed = shop.place(7, 2);
        let id = placed["id"].as_u64().unwrap();
        assert_eq!(shop.order(id), Some(placed));
        assert_eq!(shop.change(id, Some("paid")).unwrap()["status"], "paid");
        assert_eq!(shop.order(id).unwrap()["status"], "paid");
        shop.change(id, None);
        assert_eq!(shop.order(id), None);
    }
}
