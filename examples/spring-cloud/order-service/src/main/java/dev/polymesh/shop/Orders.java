package dev.polymesh.shop;

import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PathVariable;
import org.springframework.web.bind.annotation.RestController;
import org.springframework.web.client.RestTemplate;

/** Orders over HTTP. */
@RestController
class Orders {
    private final Inventory inventory;
    private final RestTemplate rest;

    Orders(Inventory inventory, RestTemplate rest) {
        this.inventory = inventory;
        this.rest = rest;
    }

    record Order(String item, Inventory.Stock stock) {}

    @GetMapping("/orders/{item}")
    Order order(@PathVariable String item) {
        return new Order(item, inventory.stock(item));
    }

    /** The same by RestTemplate, and without a circuit breaker: what fails there fails here. */
    @GetMapping("/orders/{item}/stock")
    Inventory.Stock stock(@PathVariable String item) {
        return rest.getForObject("http://inventory-service/stock/{item}", Inventory.Stock.class, item);
    }
}
