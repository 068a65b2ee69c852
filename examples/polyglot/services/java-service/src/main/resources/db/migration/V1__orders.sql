CREATE TABLE orders (
    id       BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer TEXT NOT NULL,
    created  TIMESTAMPTZ NOT NULL DEFAULT now()
);

CREATE TABLE order_lines (
    order_id BIGINT NOT NULL REFERENCES orders (id) ON DELETE CASCADE,
    position INT NOT NULL,
    product  TEXT NOT NULL,
    quantity INT NOT NULL CHECK (quantity > 0),
    price    NUMERIC(12, 2) NOT NULL CHECK (price >= 0),
    PRIMARY KEY (order_id, position)
);
