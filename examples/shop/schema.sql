-- The shop's tables and seed rows. service.py runs this file once, in one transaction, in a new
-- and empty database.

CREATE TABLE products (
    id          integer PRIMARY KEY,
    name        text    NOT NULL,
    price_cents integer NOT NULL CHECK (price_cents > 0)
);

-- Apart from products, so that a checkout's row lock never holds up a product page.
CREATE TABLE inventory (
    product_id integer PRIMARY KEY REFERENCES products,
    stock      integer NOT NULL CHECK (stock >= 0)
);

CREATE TABLE orders (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    product_id  integer NOT NULL REFERENCES products,
    quantity    integer NOT NULL CHECK (quantity > 0),
    total_cents bigint  NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE payments (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The payment service notes a payment before there is an order.
    order_id     bigint UNIQUE REFERENCES orders,
    amount_cents bigint NOT NULL,
    status       text   NOT NULL
);

-- What the mail worker would give to a mail server.
CREATE TABLE mails (
    order_id bigint      PRIMARY KEY REFERENCES orders,
    subject  text        NOT NULL,
    body     text        NOT NULL,
    sent_at  timestamptz NOT NULL DEFAULT now()
);

-- load.py asks for products 1 to 100 and orders 1 to 20: keep its constants and these in step.
INSERT INTO products (id, name, price_cents)
SELECT n, (ARRAY['Anvil', 'Balloon', 'Candle', 'Drum', 'Engine'])[1 + n % 5] || ' no. ' || n,
       100 + (n * 7919) % 9900
FROM generate_series(1, 100) AS n;

-- Enough for hours of load: out of stock should be something that one asks for (product 101).
INSERT INTO inventory (product_id, stock)
SELECT id, 1000000 FROM products;

INSERT INTO products (id, name, price_cents) VALUES (101, 'Sold-out souvenir', 1999);
INSERT INTO inventory (product_id, stock) VALUES (101, 0);

INSERT INTO orders (product_id, quantity, total_cents)
SELECT id, 1, price_cents FROM products WHERE id <= 20 ORDER BY id;

INSERT INTO payments (order_id, amount_cents, status)
SELECT id, total_cents, 'captured' FROM orders ORDER BY id;
