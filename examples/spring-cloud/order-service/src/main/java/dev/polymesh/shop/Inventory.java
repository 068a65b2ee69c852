package dev.polymesh.shop;

import org.springframework.cloud.openfeign.FeignClient;
import org.springframework.stereotype.Component;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PathVariable;

/** The inventory, by its name in Eureka. */
@FeignClient(name = "inventory-service", fallback = Inventory.Unknown.class)
interface Inventory {
    record Stock(String item, int count, String servedBy) {}

    @GetMapping("/stock/{item}")
    Stock stock(@PathVariable("item") String item);

    /** What an order says of the stock while the inventory does not answer, or its circuit is open. */
    @Component
    class Unknown implements Inventory {
        @Override
        public Stock stock(String item) {
            return new Stock(item, -1, "nobody");
        }
    }
}
